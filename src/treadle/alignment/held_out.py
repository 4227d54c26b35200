"""The pairs that a training step did not see, so that a path is stated once in a recipe."""

from __future__ import annotations

from treadle.alignment.aspects import AspectPreferences
from treadle.alignment.preferences import PairFiles, Pairs, Preferences
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Reads, Workspace
from treadle.data.records import Preference
from treadle.train.run import Run


class HeldOut(Pairs, Reads):
    """The validation part of the files that an earlier step took its pairs from."""

    aspect: str = ""
    """Which of them, where the step learns several aspects."""

    def resolve(self, workspace: Workspace | None) -> Pairs:
        if workspace is None:
            raise TreadleError(f"HeldOut(step={self.step}): there are steps in pipelines alone")
        pairs = self._trained_on(workspace)
        if not isinstance(pairs, PairFiles):
            raise TreadleError(
                f"HeldOut(step={self.step}): the step has no pairs out of files, of which a part "
                "could be held out"
            )
        return pairs.replace(held_out=True)

    def _trained_on(self, workspace: Workspace) -> Pairs | None:
        (step,) = (s for s in workspace.pipeline.steps if s.name == self.step)
        match step:
            case Run(source=Preferences(pairs=pairs)):
                return pairs
            case Run(source=AspectPreferences(aspects=aspects)):
                return next((a.pairs for a in aspects if a.name == self.aspect), None)
        return None

    def pair(self, index: int) -> Preference:
        raise TreadleError(f"HeldOut(step={self.step}): not resolved")

    def count(self) -> int:
        raise TreadleError(f"HeldOut(step={self.step}): not resolved")
