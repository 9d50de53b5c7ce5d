"""Several teachers: who is compared with whom, what runs, and what is remembered."""

from functools import partial

import pytest
import torch

from distill.errors import UserError
from distill.features import Features
from distill.heads.kd import KD
from distill.heads.rkd import RKD
from distill.heads.rrd import RRD
from distill.networks import Ensemble, FrozenTeacher, Timm
from distill.objective import Term
from distill.schedules import Progress, Until
from distill.training.distillation import DistillationModule
from tests.training.test_modules import SETTINGS, fit

BATCH = {"image": torch.rand(4, 3, 32, 32), "label": torch.arange(4), "index": torch.arange(4)}


def module(seed=0, heads=None, **kwargs):
    torch.manual_seed(seed)
    teachers = {"cnn": Timm("test_resnet"), "vit": Timm("test_vit"), "both": Ensemble(of=["cnn", "vit"])}
    heads = heads or {"kd": Term(KD(), teacher="both"), "rkd": Term(RKD(), teacher="vit")}
    return DistillationModule(
        student=Timm("test_efficientnet"), **{"teachers": teachers, "heads": heads, **SETTINGS, **kwargs}
    )


def passes(distiller, progress):
    """Return the number of forward passes of each network in one step."""
    counts = {}
    handles = []
    for name, teacher in distiller.teachers.items():
        if isinstance(teacher, FrozenTeacher):
            counts[name] = 0
            count = partial(lambda name, *_: counts.update({name: counts[name] + 1}), name)
            handles.append(teacher.network.register_forward_hook(count))
    losses = distiller(BATCH, progress)
    for handle in handles:
        handle.remove()
    return counts, losses


def test_each_term_is_compared_with_its_own_teacher():
    distiller = module().distiller.eval()
    losses = distiller(BATCH, Progress())
    student = distiller.student(BATCH["image"])
    cnn, vit = (distiller.teachers[name](BATCH["image"]) for name in ("cnn", "vit"))
    mean = Features(logits=(cnn.logits + vit.logits) / 2)
    torch.testing.assert_close(losses.values["kd"], KD()(student, mean, BATCH))
    torch.testing.assert_close(losses.values["rkd"], RKD()(student, vit, BATCH))


def test_every_network_runs_once_however_many_terms_read_it():
    heads = {
        "kd": Term(KD(), teacher="both"),
        "rkd": Term(RKD(), teacher="vit"),
        "kd_vit": Term(KD(), teacher="vit"),
        "kd_cnn": Term(KD(), teacher="cnn"),
    }
    counts, _ = passes(module(heads=heads).distiller, Progress())
    assert counts == {"cnn": 1, "vit": 1}


def test_a_teacher_that_no_term_reads_does_not_run():
    heads = {"kd": Term(KD(), Until(1.0, steps=2), teacher="cnn"), "rkd": Term(RKD(), teacher="vit")}
    distiller = module(heads=heads).distiller
    counts, losses = passes(distiller, Progress(step=1))
    assert counts == {"cnn": 1, "vit": 1}
    assert losses.weights["kd"] == 1
    counts, losses = passes(distiller, Progress(step=2))
    assert counts == {"cnn": 0, "vit": 1}
    assert losses.weights["kd"] == 0
    assert set(losses.values) == {"task", "rkd"}


def test_a_teacher_whose_term_keeps_a_memory_runs_without_a_weight_too():
    heads = {"rrd": Term(RRD(size=16), Until(1.0, steps=2), teacher="cnn")}
    distiller = module(heads=heads).distiller
    counts, losses = passes(distiller, Progress(step=5))
    assert counts == {"cnn": 1, "vit": 0}
    assert set(losses.values) == {"task", "rrd"}
    assert distiller.objective.heads["rrd"].queue.count == 4


def test_a_term_that_is_skipped_leaves_gradients_of_zero():
    heads = {"rkd": Term(RKD(of="embedding"), Until(1.0, steps=2), teacher="vit")}
    distiller = module(heads=heads, task=Term(KD(), 0.0)).distiller
    losses = distiller(BATCH, Progress(step=2))
    assert losses.total.item() == 0
    losses.total.backward()
    gradients = {name: parameter.grad for name, parameter in distiller.student.model.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is None} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert not any(gradient.any() for gradient in gradients.values() if gradient is not None)


def test_the_features_that_members_share_are_averaged():
    distiller = module().distiller
    found = distiller.teacher_features(BATCH["image"], ["both"])
    assert found["both"].embedding is None, "the two embeddings have different widths"
    torch.testing.assert_close(found["both"].logits, (found["cnn"].logits + found["vit"].logits) / 2)


def test_validation_names_the_teacher_that_the_student_agrees_with(tmp_path):
    length = {"max_epochs": 1, "max_steps": -1, "limit_train_batches": 1, "limit_val_batches": 1}
    figures = set(fit(module(), tmp_path, **length).callback_metrics)
    for teacher in ("cnn", "vit", "both"):
        assert {f"val/{teacher}/agreement", f"val/{teacher}/kl_to_teacher"} <= figures
    assert "val/agreement" not in figures


def test_a_run_with_several_teachers_resumes_and_knows_each_of_them(tmp_path):
    fit(module(), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not any("teachers" in name for name in saved["state_dict"])
    assert set(saved["distill"]["teachers"]) == {"cnn", "vit", "both"}
    assert fit(module(), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=5).global_step == 5
    with pytest.raises(UserError, match=r"model.teachers.cnn: the checkpoint was trained with test_resnet \(weights"):
        fit(module(seed=1), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=5)


def test_each_teacher_computes_in_its_own_dtype():
    teachers = module(teacher_dtype={"vit": "bfloat16"}).teachers
    dtypes = {name: next(teachers[name].network.model.parameters()).dtype for name in ("cnn", "vit")}
    assert dtypes == {"cnn": torch.float32, "vit": torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": {"kd": Term(KD())}}, r"model.heads.kd.head: there are several teachers, cnn, vit, both: name one"),
        ({"heads": {"kd": Term(KD(), teacher="cn")}}, r"model.heads.kd.head: there is no teacher 'cn'"),
        (
            {"heads": {"rkd": Term(RKD(), teacher="both")}},
            r"model.heads.rkd.head: RKD needs 'embedding' of the",
        ),
        ({"teachers": {"a": Ensemble(["b", "c"])}}, r"model.teachers.a: of: there is no teacher 'b' to average"),
        ({"teachers": {"keys": Timm("test_vit")}}, r"a teacher cannot be called 'keys'"),
        ({"teacher": Timm("test_vit"), "teachers": {"teacher": Timm("test_vit")}}, r"choose another name"),
        ({"teacher_dtype": {"vti": "float16"}}, r"model.teacher_dtype: there is no teacher 'vti': did you mean 'vit'"),
    ],
)
def test_mistakes_are_named_before_the_first_step(arguments, message):
    with pytest.raises(UserError, match=message):
        module(**arguments)


def test_an_ensemble_of_one_or_of_teachers_that_share_nothing_is_refused():
    with pytest.raises(UserError, match="at least two different teachers, given"):
        Ensemble(["a", "a"])
    torch.manual_seed(0)
    members = {
        name: FrozenTeacher(built(Timm(name), classes)) for name, classes in (("test_vit", 5), ("test_resnet", 6))
    }
    with pytest.raises(UserError, match=r"no feature of the same shape to average \(test_vit: logits 5, embedding"):
        Ensemble(list(members)).build(members)


def built(network, classes):
    network.build(classes, (3, 32, 32))
    return network
