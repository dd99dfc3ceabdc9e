"""Rewards for configs/ppo/demo.yaml: a function of answers, as `reward.function=configs/ppo/rewards.py:brief` names it.

An answer has `prompt`, `text`, `prompt_tokens`, `tokens` and `ended`.
"""


def brief(answers):
    """A sentence that comes to its end soon: 1 for a full stop, less the longer it takes."""
    return [(("." in answer.text) - 0.02 * len(answer.tokens)) for answer in answers]
