"""What a text is worth: judges, diversity, elimination rules, learned models, and their composition."""

from typing import TYPE_CHECKING, Any

from ..llm_backends.parts import register_kind, register_part
from .base import FunctionReward, NonFiniteRewardError, Reward, Sample, Score, score_with_retries
from .compose import WeightedSum
from .contextual_ranker import ContextualRanker
from .diversity import DiversityReward
from .edits import EditedPair, EditLabels, Pairs, edit_labels, edit_statistics, read_pairs, write_pairs
from .elimination import EliminationReward, JudgedElimination, eliminated_by
from .ground_truth import GroundTruth, LabelMatch, RegressionReward, SpanReward, parse_label, parse_number
from .hinted_response import HintedResponse
from .instance_format import Instance, parse_pair, read_pair
from .judge import EqualityJudge
from .pairwise import Comparison, Pair, PairwiseJudge, ScoredComparison, compare
from .pairwise_ranker import PairwiseRanker
from .quality import LinearReward, LinearRule
from .quality_likelihood import Fluency, LikelihoodRatio, Likelihoods
from .quality_scorers import BooleanQA, NeighbourDistance, OutputLength
from .rank_reward import RankReward
from .rankers import CandidateScores, FunctionRanker, GroundTruthRanker, ProbabilisticRanker, Ranker
from .ranking import Ranking, RankingJudge, RankingQuestion, rank
from .rouge_gate import RougeGate, RougePool, pairwise_rouge_l, rouge_l
from .rubric import Grades, Rubric, RubricJudge, grade
from .sentiment import ReviewClassifier, VaderSentiment
from .task_gain import TaskGain
from .task_prompt import Demonstration, LabelledExample, TaskPrompt
from .task_reward import TaskReward
from .task_score import TaskResult, TaskScorer

if TYPE_CHECKING:
    from .quality_models import HubRewardModel, UniEval
    from .token_reward import RewardModel, SequenceReward, TokenReward

_LAZY = dict.fromkeys(("RewardModel", "SequenceReward", "TokenReward"), ".token_reward") | dict.fromkeys(
    ("HubRewardModel", "UniEval"), ".quality_models"
)
"""Imported when asked for: they need transformers and peft."""

__all__ = [
    "BooleanQA",
    "CandidateScores",
    "Comparison",
    "ContextualRanker",
    "Demonstration",
    "DiversityReward",
    "EditLabels",
    "EditedPair",
    "EliminationReward",
    "EqualityJudge",
    "Fluency",
    "FunctionRanker",
    "FunctionReward",
    "Grades",
    "GroundTruth",
    "GroundTruthRanker",
    "HintedResponse",
    "HubRewardModel",
    "Instance",
    "JudgedElimination",
    "LabelMatch",
    "LabelledExample",
    "LikelihoodRatio",
    "Likelihoods",
    "LinearReward",
    "LinearRule",
    "NeighbourDistance",
    "NonFiniteRewardError",
    "OutputLength",
    "Pair",
    "Pairs",
    "PairwiseJudge",
    "PairwiseRanker",
    "ProbabilisticRanker",
    "RankReward",
    "Ranker",
    "Ranking",
    "RankingJudge",
    "RankingQuestion",
    "RegressionReward",
    "ReviewClassifier",
    "Reward",
    "RewardModel",
    "RougeGate",
    "RougePool",
    "Rubric",
    "RubricJudge",
    "Sample",
    "Score",
    "ScoredComparison",
    "SequenceReward",
    "SpanReward",
    "TaskGain",
    "TaskPrompt",
    "TaskResult",
    "TaskReward",
    "TaskScorer",
    "TokenReward",
    "UniEval",
    "VaderSentiment",
    "WeightedSum",
    "compare",
    "edit_labels",
    "edit_statistics",
    "eliminated_by",
    "grade",
    "pairwise_rouge_l",
    "parse_label",
    "parse_number",
    "parse_pair",
    "rank",
    "read_pair",
    "read_pairs",
    "rouge_l",
    "score_with_retries",
    "write_pairs",
]

register_kind("reward", Reward, FunctionReward)
register_part("reward", "judge", "instructgym.rewards.judge:EqualityJudge")
register_part("reward", "pairwise-judge", "instructgym.rewards.pairwise:PairwiseJudge")
register_part("reward", "scored-comparison", "instructgym.rewards.pairwise:ScoredComparison")
register_part("reward", "ranking-judge", "instructgym.rewards.ranking:RankingJudge")
register_part("reward", "rank", "instructgym.rewards.rank_reward:RankReward")
register_part("reward", "rubric-judge", "instructgym.rewards.rubric:RubricJudge")
register_part("reward", "diversity", "instructgym.rewards.diversity:DiversityReward")
register_part("reward", "elimination", "instructgym.rewards.elimination:EliminationReward")
register_part("reward", "judged-elimination", "instructgym.rewards.elimination:JudgedElimination")
register_part("reward", "weighted-sum", "instructgym.rewards.compose:WeightedSum")
register_part("reward", "ground-truth", "instructgym.rewards.ground_truth:GroundTruth")
register_part("reward", "label-match", "instructgym.rewards.ground_truth:LabelMatch")
register_part("reward", "regression", "instructgym.rewards.ground_truth:RegressionReward")
register_part("reward", "span", "instructgym.rewards.ground_truth:SpanReward")
register_part("reward", "token-reward", "instructgym.rewards.token_reward:TokenReward")
register_part("reward", "sequence-reward", "instructgym.rewards.token_reward:SequenceReward")
register_part("reward", "quality", "instructgym.rewards.quality:LinearReward")
register_part("reward", "likelihood-ratio", "instructgym.rewards.quality_likelihood:LikelihoodRatio")
register_part("reward", "fluency", "instructgym.rewards.quality_likelihood:Fluency")
register_part("reward", "boolean-qa", "instructgym.rewards.quality_scorers:BooleanQA")
register_part("reward", "output-length", "instructgym.rewards.quality_scorers:OutputLength")
register_part("reward", "neighbour-distance", "instructgym.rewards.quality_scorers:NeighbourDistance")
register_part("reward", "unieval", "instructgym.rewards.quality_models:UniEval")
register_part("reward", "hub-reward-model", "instructgym.rewards.quality_models:HubRewardModel")
register_part("reward", "task-gain", "instructgym.rewards.task_gain:TaskGain")
register_part("reward", "hinted-response", "instructgym.rewards.hinted_response:HintedResponse")
register_part("reward", "task", "instructgym.rewards.task_reward:TaskReward")
register_part("reward", "vader", "instructgym.rewards.sentiment:VaderSentiment")
register_part("reward", "reviews", "instructgym.rewards.sentiment:ReviewClassifier")

register_kind("ranker", Ranker, FunctionRanker)
register_part("ranker", "probabilistic", "instructgym.rewards.rankers:ProbabilisticRanker")
register_part("ranker", "contextual", "instructgym.rewards.contextual_ranker:ContextualRanker")
register_part("ranker", "pairwise", "instructgym.rewards.pairwise_ranker:PairwiseRanker")
register_part("ranker", "ground-truth", "instructgym.rewards.rankers:GroundTruthRanker")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
