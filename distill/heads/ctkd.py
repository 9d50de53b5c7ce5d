"""Curriculum temperature for knowledge distillation (Li, Li, Yang, Zhao, Song, Luo, Li, Yang, 2023)."""

from __future__ import annotations

from distill.heads.kd import KD
from distill.heads.parts.temperature import CurriculumTemperature
from distill.schedules import Number


class CTKD(KD):
    """KD at a temperature that is trained against the student, T^2 KL(teacher || student), mean over the samples.

    T = tau_init + tau_range sigmoid(theta), here `start` + `span` sigmoid(theta). The gradient of theta, through both
    softmaxes and T^2, is multiplied by lambda <= 0, so that theta climbs the loss; the student's gradient stays as it
    is. lambda falls from 0 to -1 over the first 10 epochs, from easy to hard. (The authors' code numbers epochs from 1
    and keeps lambda constant within each, here it changes with every step.) theta is in the optimizer with the
    student: the learning rate, momentum and weight decay act on it. T is logged as `temperature`.

    The authors give the term the weight 0.9 and the task 0.1. Other losses have such a temperature with
    `temperature: {class_path: CurriculumTemperature}`: CTKD on DKD is `DKD` with it.

    Args:
        start: the lower end of T; 1 as in the authors' code.
        span: the width of the range of T; 20 as t_end in the authors' code, so that T stays below 21.
        theta: theta at step 0; 1 as in the authors' code, where T is 15.6.
        gradient_scale: lambda, a number or a schedule; by default the authors' half cosine wave from 0 to -1 over 10
            epochs.
        standardize: whether each sample's logits are standardized before T, in both networks.

    Raises:
        UserError: `start` or `span` not above 0, or a number that is not finite.
    """

    learned_temperature_key = ""  # its settings are the head's own

    def __init__(
        self,
        start: float = 1.0,
        span: float = 20.0,
        theta: float = 1.0,
        gradient_scale: Number | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__(CurriculumTemperature(start, span, theta, gradient_scale), standardize)
