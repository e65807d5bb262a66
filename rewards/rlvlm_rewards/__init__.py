"""Verifiable rewards: load one by name, score responses with it. A failure is a failure, never a score of 0."""

from rlvlm_rewards.answers import final_answer
from rlvlm_rewards.loading import InvalidReward, RewardNotFound, load_reward
from rlvlm_rewards.records import Failure, Sample, Score
from rlvlm_rewards.reward import Reward, inline
from rlvlm_rewards.scoring import Limits, score, score_all

__all__ = [
    "Failure",
    "InvalidReward",
    "Limits",
    "Reward",
    "RewardNotFound",
    "Sample",
    "Score",
    "final_answer",
    "inline",
    "load_reward",
    "score",
    "score_all",
]
