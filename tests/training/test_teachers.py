"""Several teachers: who is compared with whom, what runs, and what is remembered."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch.nn.functional import interpolate

from distill.__main__ import main
from distill.errors import UserError
from distill.features import Features
from distill.heads.cross_entropy import CrossEntropy
from distill.heads.kd import KD
from distill.heads.rkd import RKD
from distill.heads.rrd import RRD
from distill.networks import Ensemble, FrozenTeacher, Timm
from distill.objective import Term
from distill.schedules import Progress, Until
from distill.training.distillation import DistillationModule
from tests.program import in_a_process
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


def test_a_term_that_has_the_name_of_another_teacher_reads_its_own():
    heads = {"cnn": Term(RKD(), teacher="vit")}
    distiller = module(heads=heads).distiller.eval()
    student, vit = distiller.student(BATCH["image"]), distiller.teachers["vit"](BATCH["image"])
    torch.testing.assert_close(distiller(BATCH, Progress()).values["cnn"], RKD()(student, vit, BATCH))


def test_features_of_one_teacher_do_not_stand_for_several():
    distiller = module().distiller
    features = distiller.student(BATCH["image"])
    with pytest.raises(UserError, match="there are several teachers, cnn, vit, both: give features by name"):
        distiller.objective(features, features, BATCH, Progress())


def test_each_teacher_sees_the_images_at_its_own_size_and_normalization():
    teachers = {
        "small": Timm("test_vit", image_size=16),
        "large": Timm("test_resnet", image_size=48, mean=(0.1,), std=(0.7,)),
    }
    heads = {"kd": Term(KD(), teacher="small"), "rkd": Term(RKD(), teacher="large")}
    distiller = module(teachers=teachers, heads=heads).distiller
    found = distiller.teacher_features(BATCH, ["small", "large"])
    large = (interpolate(BATCH["image"], (48, 48), mode="bilinear", antialias=True) - 0.1) / 0.7
    with torch.no_grad():
        assert torch.equal(found["large"].logits, teachers["large"].model(large))
    assert found["small"].grid == teachers["small"].spec.grid == (1, 1)


def test_training_changes_no_bit_of_any_teacher_and_leaves_no_gradient(tmp_path):
    trained = module()
    networks = {name: trained.teachers[name].network for name in ("cnn", "vit")}
    before = {name: deepcopy(network.state_dict()) for name, network in networks.items()}
    fit(trained, tmp_path)
    trained.train()
    for name, network in networks.items():
        assert not any(layer.training for layer in network.modules())
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in network.state_dict().items())


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
    found = distiller.teacher_features(BATCH, ["both"])
    assert found["both"].embedding is None, "the two embeddings have different widths"
    torch.testing.assert_close(found["both"].logits, (found["cnn"].logits + found["vit"].logits) / 2)


def test_an_ensemble_may_be_a_member_of_another_in_any_order():
    teachers = {
        "all": Ensemble(["both", "third"]),
        "both": Ensemble(["cnn", "vit"]),
        **{name: Timm(network) for name, network in (("cnn", "test_resnet"), ("vit", "test_vit"))},
        "third": Timm("test_vit2"),
    }
    distiller = module(teachers=teachers, heads={"kd": Term(KD(), teacher="all")}).distiller
    found = distiller.teacher_features(BATCH, ["all"])
    assert list(distiller.teachers) == list(teachers)
    expected = ((found["cnn"].logits + found["vit"].logits) / 2 + found["third"].logits) / 2
    torch.testing.assert_close(found["all"].logits, expected)


def test_members_in_half_precision_are_averaged_in_float32():
    distiller = module(teacher_dtype={"vit": "bfloat16"}).distiller
    found = distiller.teacher_features(BATCH, ["both"])
    assert found["vit"].logits.dtype == torch.bfloat16
    assert torch.equal(found["both"].logits, (found["cnn"].logits + found["vit"].logits.float()) / 2)


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
    layers = {"cnn": "fc", "vit": "head"}
    dtypes = {name: teachers[name].network.model.get_submodule(layer).weight.dtype for name, layer in layers.items()}
    assert dtypes == {"cnn": torch.float32, "vit": torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": {"kd": Term(KD())}}, r"model.heads.kd.head: there are several teachers, cnn, vit, both: name one"),
        ({"heads": {"kd": Term(KD(), teacher="cn")}}, r"kd.head: there is no teacher 'cn': did you mean 'cnn'"),
        (
            {"heads": {"rkd": Term(RKD(), teacher="both")}},
            r"model.heads.rkd.head: RKD needs 'embedding' of the teacher, but an ensemble averages only equal shapes, "
            r"and those of 'embedding' are: cnn 96, vit 64$",
        ),
        (
            {"heads": {"rkd": Term(RKD(of="tokens"), teacher="both")}},
            r"those of 'tokens' are: cnn 1 x 96 \(1 x 1 cells\), vit 4 x 64 \(2 x 2 cells\)$",
        ),
        ({"task": Term(CrossEntropy(), teacher="cnn")}, r"model.task.head: CrossEntropy compares with no teacher"),
        (
            {"teachers": {"a": Ensemble(["b", "c"]), "b": Ensemble(["a", "c"]), "c": Timm("test_vit")}},
            r"model.teachers.a: an ensemble cannot average itself: a of b of a$",
        ),
        ({"teacher_dtype": {"both": "float16"}}, r"there is no network 'both': an ensemble computes nothing: name its"),
        ({"teachers": {"a": Ensemble(["b", "c"])}}, r"model.teachers.a: of: there is no teacher 'b' to average"),
        ({"teachers": {"keys": Timm("test_vit")}}, r"a teacher cannot be called 'keys'"),
        ({"teacher": Timm("test_vit"), "teachers": {"teacher": Timm("test_vit")}}, r"choose another name"),
        ({"teacher_dtype": {"vti": "float16"}}, r"model.teacher_dtype: there is no network 'vti': did you mean 'vit'"),
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


CONFIGURATION = """
data: {class_path: Digits, init_args: {batch_size: 16}}
model:
  student: {class_path: Timm, init_args: {name: test_vit3}}
  teachers:
    first: {class_path: Timm, init_args: {name: test_vit}}
    second: {class_path: Timm, init_args: {name: test_vit2}}
    both: {class_path: Ensemble, init_args: {of: [first, second]}}
  heads:
    kd: {head: KD, teacher: both}
    rkd: {head: RKD, teacher: first}
    rrd: {head: {class_path: RRD, init_args: {size: 40}}, teacher: second}
  optimizer: {class_path: SGD, init_args: {lr: 0.01}}
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 4
  limit_val_batches: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: run
"""


@pytest.mark.slow
def test_the_program_checks_trains_and_resumes_with_several_teachers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(CONFIGURATION)
    assert main(["check", "--config=a.yaml"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("306,890") >= 1, "the parameters of the first teacher"
    assert "mean of first and second" in printed
    assert main(["fit", "--config=a.yaml"]) == 0
    assert main(["fit", "--config=a.yaml", "--resume", "--trainer.max_epochs=2"]) == 0
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    for teacher in ("first", "second", "both"):
        assert f"val/{teacher}/agreement" in header
    capsys.readouterr()
    assert main(["fit", "--config=a.yaml", "--resume", "--model.heads.rkd.teacher=second"]) == 2
    assert "model.heads.rkd.teacher is 'second', was 'first'" in capsys.readouterr().err
    wrong = CONFIGURATION.replace("class_path: Ensemble", "class_path: Ensembel")
    (tmp_path / "b.yaml").write_text(wrong)
    assert main(["check", "--config=b.yaml"]) == 2
    assert "there is no class 'Ensembel': did you mean 'Ensemble'?" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_with_several_teachers_train_and_resume_like_one_process(tmp_path):
    (tmp_path / "a.yaml").write_text(CONFIGURATION)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=8"]
    for name, extra in (("one", []), ("two", two)):
        arguments = ["fit", "--config=a.yaml", *extra, f"--trainer.default_root_dir={name}"]
        for length in ([], ["--resume", "--trainer.max_epochs=2"]):
            process = in_a_process(*arguments, *length, cwd=tmp_path)
            assert process.returncode == 0, process.stderr
    single, double = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("one", "two")
    )
    assert single["global_step"] == double["global_step"] == 8
    assert single["distill"]["teachers"] == double["distill"]["teachers"]
    for name, tensor in single["state_dict"].items():
        torch.testing.assert_close(
            double["state_dict"][name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text
        )
