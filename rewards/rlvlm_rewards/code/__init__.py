"""The reward `code`: programs graded in a sandbox. `curate` makes the tests of a problem."""

from rlvlm_rewards.code.curate import Curated, GeneratorFailed, SandboxFailed, curate
from rlvlm_rewards.code.reward import Code

__all__ = ["Code", "Curated", "GeneratorFailed", "SandboxFailed", "curate"]
