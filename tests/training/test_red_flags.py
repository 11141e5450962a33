"""Red flags: raised by curves that are wrong, once, and not by curves that are well."""

from __future__ import annotations

import math
from random import Random

import pytest

from rrcli.training import red_flags
from rrcli.training.red_flags import RedFlags


def raised(losses, steps=None, refine=None, feedback=0.1, memory=0.3, depth=2, guessing=math.inf) -> list[str]:
    flags, found = RedFlags(steps or len(losses), guessing=guessing), []
    for step, loss in enumerate(losses, start=1):
        scalars = {"train/loss/final_ce": loss, "train/feedback_norm": feedback if step > 1 else 0.0}
        scalars["train/generation/avg_refine_steps"] = refine if refine is not None else 1.4
        found += flags.observe(step, scalars, depth, memory)
    return [message.split(":")[0] for message in found]


def noisy(curve, spread=0.3):
    random = Random(0)
    return [value + random.gauss(0, spread) for value in curve]


def noise(step):
    return Random(step).gauss(0, 0.1)


FALLING = noisy([1.5 + 2 * math.exp(-step / 40) for step in range(200)])


def test_a_loss_that_falls_with_noise_raises_nothing():
    assert raised(FALLING) == []


@pytest.mark.parametrize("drift", [0.0, 0.002])
def test_a_loss_that_does_not_fall_is_said_once(drift):
    assert raised([2.0 + drift * step for step in range(300)]) == [red_flags.NOT_FALLING]


def test_the_first_third_of_the_steps_until_then_is_compared_with_the_last_third():
    """Of 50 steps the first and the last 16, whose means stand beside; halves or fewer steps would judge otherwise."""
    assert raised([1.9] * 5 + [2.1] * 11 + [2.0] * 18 + [1.95] * 16, steps=60) == []  # 2.04 and 1.95
    assert raised([2.0] * 16 + [0.1] * 9 + [1.9] * 25, steps=60) == []  # 2.0 and 1.9
    assert raised([2.0] * 16 + [2.5] * 9 + [2.1] * 25, steps=60) == [red_flags.NOT_FALLING]  # 2.0 and 2.1


def test_a_loss_that_explodes_is_said_once():
    curve = FALLING + noisy([1.5 + step * 0.2 for step in range(60)])
    assert raised(curve, steps=400) == [red_flags.EXPLODING]


def test_a_model_ruined_in_its_first_steps_is_said_to_explode_and_not_to_learn_too_slowly():
    curve = [1.2, 2.5, 6.6, *noisy([12.7 + step / 50 for step in range(97)])]
    assert raised(curve, guessing=math.log(1024)) == [red_flags.EXPLODING]
    assert raised(noisy([6.95 - step / 200 for step in range(100)]), guessing=math.log(1024)) == []


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_either_text_or_answers_are_no_explosion(seed):
    random = Random(seed)
    kinds = [random.choice((0.5, 3.0)) for _ in range(300)]
    assert red_flags.EXPLODING not in raised([max(0.1, random.gauss(kind, 0.5)) for kind in kinds])


def test_a_single_outlier_is_no_explosion():
    assert raised([*FALLING[:100], 9.0, *FALLING[100:]]) == []


def test_refining_to_the_end_always_is_said_in_the_second_half_only():
    assert raised(FALLING, refine=2.0) == [red_flags.ALWAYS_MAX]
    assert raised(FALLING[:90], steps=200, refine=2.0) == []
    assert raised(FALLING, refine=2.0, depth=3) == []


def test_no_feedback_after_the_first_steps_is_said():
    assert raised(FALLING, feedback=0.0) == [red_flags.SILENTLY_OFF]
    assert raised(FALLING[: red_flags.FEEDBACK_STEP - 1], feedback=0.0) == []


@pytest.mark.parametrize(("behind", "found"), [(0.3, [red_flags.WORSE_PASS]), (0.05, []), (-0.3, [])])
def test_a_last_pass_that_stays_behind_pass_0_is_said_once(behind, found):
    flags, messages = RedFlags(200), []
    for step, loss in enumerate(FALLING, start=1):
        scalars = {"train/loss/final_ce": loss, "train/feedback_norm": 0.9, "train/depth_ce/0": loss}
        scalars |= {"train/depth_ce/1": loss + 2 * behind, "train/depth_ce/2": loss + noise(step) + behind}
        messages += flags.observe(step, scalars, depth=2, memory_share=0.3)
    assert [message.split(":")[0] for message in messages] == found
    assert all("0.90 of the span's input" in message for message in messages)


def test_one_bad_step_of_the_last_pass_is_not_said():
    flags = RedFlags(200)
    for step, loss in enumerate(FALLING, start=1):
        scalars = {"train/loss/final_ce": loss, "train/feedback_norm": 0.9, "train/depth_ce/0": loss}
        scalars["train/depth_ce/1"] = loss + (5.0 if step == 100 else noise(step))
        assert flags.observe(step, scalars, depth=1, memory_share=0.3) == []


def test_little_memory_left_is_said_once():
    assert raised(FALLING, memory=0.97) == [red_flags.MEMORY]


def test_what_was_raised_before_a_resume_is_not_raised_again():
    flags = RedFlags(100, [red_flags.MEMORY])
    assert flags.observe(1, {"train/loss/final_ce": 2.0}, 0, 0.99) == []


def test_every_warning_says_what_to_try():
    flags = RedFlags(100)
    for step in range(1, 101):
        scalars = {"train/loss/final_ce": 2.0, "train/feedback_norm": 0.0, "train/generation/avg_refine_steps": 2.0}
        for message in flags.observe(step, scalars, 2, 0.99):
            assert "--" in message
    assert len(flags.raised) == 4
