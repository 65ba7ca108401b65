"""What a text is worth: judges, diversity, elimination rules, learned models, and their composition."""

from typing import TYPE_CHECKING, Any

from ..llm_backends.parts import register_kind, register_part
from .base import FunctionReward, NonFiniteRewardError, Reward, Sample, Score, score_with_retries
from .compose import WeightedSum
from .elimination import EliminationReward, JudgedElimination, eliminated_by
from .ground_truth import GroundTruth, LabelMatch, RegressionReward, SpanReward, parse_label, parse_number
from .judges.equality import EqualityJudge
from .judges.pairwise import Comparison, Pair, PairwiseJudge, ScoredComparison, compare
from .judges.ranking import Ranking, RankingJudge, RankingQuestion, rank
from .judges.rubric import Grades, Rubric, RubricJudge, grade
from .learned.edits import EditedPair, EditLabels, Pairs, edit_labels, edit_statistics, read_pairs, write_pairs
from .prompt_scoring.hinted_response import HintedResponse
from .prompt_scoring.scorer import TaskResult, TaskScorer
from .prompt_scoring.task_gain import TaskGain
from .prompt_scoring.task_prompt import Demonstration, LabelledExample, TaskPrompt
from .prompt_scoring.task_reward import TaskReward
from .quality.instance_format import Instance, parse_pair, read_pair
from .quality.likelihood import Fluency, LikelihoodRatio, Likelihoods
from .quality.linear import LinearReward, LinearRule
from .quality.scorers import BooleanQA, NeighbourDistance, OutputLength
from .rankers.base import CandidateScores, FunctionRanker, GroundTruthRanker, ProbabilisticRanker, Ranker
from .rankers.contextual import ContextualRanker
from .rankers.pairwise import PairwiseRanker
from .rankers.reward import RankReward
from .texts.diversity import DiversityReward
from .texts.rouge import RougeGate, RougePool, pairwise_rouge_l, rouge_l
from .texts.sentiment import ReviewClassifier, VaderSentiment

if TYPE_CHECKING:
    from .learned.token_reward import RewardModel, SequenceReward, TokenReward
    from .quality.hub_models import HubRewardModel, UniEval

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
register_part("reward", "judge", "instructgym.rewards.judges.equality:EqualityJudge")
register_part("reward", "pairwise-judge", "instructgym.rewards.judges.pairwise:PairwiseJudge")
register_part("reward", "scored-comparison", "instructgym.rewards.judges.pairwise:ScoredComparison")
register_part("reward", "ranking-judge", "instructgym.rewards.judges.ranking:RankingJudge")
register_part("reward", "rank", "instructgym.rewards.rankers.reward:RankReward")
register_part("reward", "rubric-judge", "instructgym.rewards.judges.rubric:RubricJudge")
register_part("reward", "diversity", "instructgym.rewards.texts.diversity:DiversityReward")
register_part("reward", "elimination", "instructgym.rewards.elimination:EliminationReward")
register_part("reward", "judged-elimination", "instructgym.rewards.elimination:JudgedElimination")
register_part("reward", "weighted-sum", "instructgym.rewards.compose:WeightedSum")
register_part("reward", "ground-truth", "instructgym.rewards.ground_truth:GroundTruth")
register_part("reward", "label-match", "instructgym.rewards.ground_truth:LabelMatch")
register_part("reward", "regression", "instructgym.rewards.ground_truth:RegressionReward")
register_part("reward", "span", "instructgym.rewards.ground_truth:SpanReward")
register_part("reward", "token-reward", "instructgym.rewards.learned.token_reward:TokenReward")
register_part("reward", "sequence-reward", "instructgym.rewards.learned.token_reward:SequenceReward")
register_part("reward", "quality", "instructgym.rewards.quality.linear:LinearReward")
register_part("reward", "likelihood-ratio", "instructgym.rewards.quality.likelihood:LikelihoodRatio")
register_part("reward", "fluency", "instructgym.rewards.quality.likelihood:Fluency")
register_part("reward", "boolean-qa", "instructgym.rewards.quality.scorers:BooleanQA")
register_part("reward", "output-length", "instructgym.rewards.quality.scorers:OutputLength")
register_part("reward", "neighbour-distance", "instructgym.rewards.quality.scorers:NeighbourDistance")
register_part("reward", "unieval", "instructgym.rewards.quality.hub_models:UniEval")
register_part("reward", "hub-reward-model", "instructgym.rewards.quality.hub_models:HubRewardModel")
register_part("reward", "task-gain", "instructgym.rewards.prompt_scoring.task_gain:TaskGain")
register_part("reward", "hinted-response", "instructgym.rewards.prompt_scoring.hinted_response:HintedResponse")
register_part("reward", "task", "instructgym.rewards.prompt_scoring.task_reward:TaskReward")
register_part("reward", "vader", "instructgym.rewards.texts.sentiment:VaderSentiment")
register_part("reward", "reviews", "instructgym.rewards.texts.sentiment:ReviewClassifier")

register_kind("ranker", Ranker, FunctionRanker)
register_part("ranker", "probabilistic", "instructgym.rewards.rankers.base:ProbabilisticRanker")
register_part("ranker", "contextual", "instructgym.rewards.rankers.contextual:ContextualRanker")
register_part("ranker", "pairwise", "instructgym.rewards.rankers.pairwise:PairwiseRanker")
register_part("ranker", "ground-truth", "instructgym.rewards.rankers.base:GroundTruthRanker")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
