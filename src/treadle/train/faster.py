"""Faster layers for training, as transforms: the same function, parameters and names.

    TritonKernels   RMSNorm and gate by kernels for GPUs
    CompileLayers   layers that see one token at a time, by torch.compile

Attention stays as it is: how texts of unequal length lie in a batch changes with every batch, and
torch's fused kernel does its work already.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.models.transform import M, Transform, match_modules
from treadle.nn.ffn.ffn import GatedMLPLayer
from treadle.nn.norms import RMSNormLayer

CARDS = (
    Card(
        id="arch.fused.triton",
        paper="Tillet et al. 2019, Triton; Hsu et al. 2024, Liger kernels, arXiv:2410.10989",
        summary="RMSNorm and gated activations forward and backward in Triton, for training.",
        recipe="treadle show quickstart-scratch steps.1.transforms='[{kind: TritonKernels}]'",
        oracle="tests/kernels/test_kernels_gpu_elementwise.py::test_gated_and_gradients",
    ),
    Card(
        id="arch.fused.compiled",
        paper="Ansel et al. 2024, PyTorch 2",
        summary="Feed-forward layers compiled by torch.compile, adapters in them included.",
        recipe="treadle run quickstart-scratch steps.1.transforms='[{kind: CompileLayers}]'",
        oracle="tests/train/test_train_faster.py::test_compiled_layers_equal_their_definition",
    ),
)


class TritonKernels(Transform):
    """Norms and gates by Triton. The model must train on a GPU."""

    def __call__(self, model: M) -> M:
        """
        Raises:
            ConfigError: Triton is not installed, or nothing in the model has such a kernel.
        """
        if find_spec("triton") is None:
            raise ConfigError(
                "TritonKernels need `triton`, which is not installed: pip install 'treadle[gpu]', "
                "or leave them out"
            )
        from treadle.kernels.gpu.gated import gated
        from treadle.kernels.gpu.rms_norm import rms_norm

        norms = [m for m in model.modules() if isinstance(m, RMSNormLayer)]
        gates = [m for m in model.modules() if isinstance(m, GatedMLPLayer)]
        if not norms and not gates:
            raise ConfigError("TritonKernels: the model has neither RMSNorm nor GatedMLP")
        for norm in norms:
            norm.kernel = rms_norm
        for gate in gates:
            gate.kernel = gated
        return model


class CompileLayers(Transform):
    """Layers `[N D] -> [N D]` compiled, one graph for any number of tokens."""

    targets: tuple[str, ...] = ("blocks.*.ffn",)

    def __call__(self, model: M) -> M:
        """
        Raises:
            ConfigError: a target matches nothing.
        """
        for layer in match_modules(
            model, self.targets, (nn.Module,), owner="CompileLayers"
        ).values():
            # Isolated: the layers are alike, but their adapters and precision may not be.
            layer.compile(fullgraph=True, dynamic=True, isolate_recompiles=True)
        return model
