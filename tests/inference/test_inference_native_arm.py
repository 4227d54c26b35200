"""The native kernels for ARM, compiled here and run by an emulator: the tests of the others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from inference import test_inference_native as decoders
from kernels import test_kernels_native as products
from kernels.emulated import Emulated, Target

from treadle.inference import native_runner
from treadle.kernels.native import matrix
from treadle.kernels.native.levels import LEVELS

ARM = Target("aarch64-linux-gnu-g++", ("qemu-aarch64-static",))
ON_ARM = {level.name: level for level in LEVELS if level.name.startswith("neon")}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, (ARM.compiler, *ARM.emulator))),
        reason="apt install g++-aarch64-linux-gnu qemu-user-static",
    ),
]


@pytest.fixture(scope="module", params=ON_ARM)
def emulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Emulated]:
    with Emulated(ARM, ON_ARM[request.param], tmp_path_factory.mktemp("arm")) as library:
        yield library


@pytest.fixture
def level(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name, with its library in the place of this processor's."""
    name = emulated.treadle_level().decode()
    for module in (matrix, native_runner):
        monkeypatch.setattr(module, "library", lambda level: emulated)
        monkeypatch.setattr(module, "find_level", lambda name_=None: ON_ARM[name])
    return name


def test_arm_computes_at_the_level_it_is_compiled_for(emulated: Emulated) -> None:
    assert emulated.treadle_level().decode() in ON_ARM


@pytest.mark.parametrize("format", matrix.FORMATS)
def test_arm_products_match_the_definition(format: str, level: str) -> None:
    products.test_products_match_the_definition(format, level)
    products.test_extreme_codes_and_activations_do_not_overflow(format, level)


@pytest.mark.parametrize("format", ["Q4_0", "Q5_1", "Q8_0"])
def test_arm_logits_are_those_of_the_dense_model(format: str, level: str) -> None:
    decoders.test_logits_are_those_of_the_dense_model(decoders.TINY, format)


@pytest.mark.parametrize("name", decoders.FAMILIES)
def test_arm_families_are_those_of_the_dense_model(name: str, level: str) -> None:
    decoders.test_families_are_those_of_the_dense_model(name)


def test_arm_batches_pages_and_gates(level: str) -> None:
    decoders.test_batched_and_in_pieces_equals_one_by_one()
    decoders.test_gates_beyond_the_range_of_exp_close()
    decoders.test_any_number_of_threads(3)
