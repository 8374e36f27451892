"""The tasks on real data: reproducible samples, nothing held out is trained on, metrics that are what they say."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainer.errors import JobError
from trainer.task import Task
from trainer.tasks.bytelm import GPT, SIZES, ByteLM, Windows, find_sources, is_held_out
from trainer.tasks.digits import load_digits
from trainer.tasks.segment import CLASSES, INK, SIDES, Segment


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and on a busy machine lose seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def segment() -> Segment:
    return Segment(width=4, size=SIDES[-1], digits=3)  # the smallest canvas


@pytest.fixture(scope="module")
def bytelm() -> ByteLM:
    return ByteLM("1m")


def generator(epoch: int, index: int) -> np.random.Generator:
    return np.random.default_rng((0, epoch, index))


def first_batch(task: Task, size: int = 3) -> Any:
    return next(iter(DataLoader(task.eval_dataset(), batch_size=size, collate_fn=task.collate)))


def summarise(task: Task, pairs: list[tuple[Tensor, Any]]) -> dict[str, float]:
    sums: dict[str, Tensor] = {}
    for output, batch in pairs:
        for name, value in task.metrics(output, batch).items():
            assert value.shape[0] == output.shape[0]
            sums[name] = sums.get(name, torch.zeros(())) + value.double().sum(0)
    return dict(task.summary(sums, sum(len(output) for output, _ in pairs)))


def test_a_canvas_depends_on_its_generator_alone(segment: Segment) -> None:
    once, again = segment.train_dataset(), segment.train_dataset()
    first = once.sample(7, generator(0, 7))
    once.sample(8, generator(0, 8))
    assert all(map(torch.equal, first, again.sample(7, generator(0, 7))))
    assert not torch.equal(first[0], once.sample(7, generator(1, 7))[0])
    assert not torch.equal(first[0], once.sample(8, generator(0, 7))[0])


def test_evaluation_canvases_never_change(segment: Segment) -> None:
    assert not hasattr(segment.eval_dataset(), "sample")  # which the trainer would call with another seed per epoch
    once, again = segment.eval_dataset(), Segment(width=4, size=12, digits=3).eval_dataset()
    for index in (0, 5, len(once) - 1):
        assert all(map(torch.equal, once[index], again[index]))
    assert not torch.equal(once[0][0], once[1][0])


def test_every_digit_image_serves_one_side_only(segment: Segment) -> None:
    train = {image.tobytes() for image in segment.train_dataset().images}
    held_out = {image.tobytes() for image in segment.eval_dataset().images}
    everything = {image.numpy().tobytes() for image in load_digits()[0]}
    assert not train & held_out
    assert train | held_out == everything


def test_a_canvas_shows_its_digit_on_top_and_labels_its_ink(segment: Segment) -> None:
    data = segment.train_dataset()
    for index in range(100):
        canvas, classes = data.sample(index, generator(0, index))
        assert canvas.shape == (1, 12, 12) and canvas.dtype == torch.float32
        assert classes.shape == (12, 12) and classes.dtype == torch.int64
        shown = int((classes == 1 + data.labels[index]).sum())
        least = min(int((part @ data.images[index] @ part.T > INK).sum()) for part in data.stretch.values())
        assert shown >= least > 0
        assert canvas[0][classes > 0].mean() > canvas[0][classes == 0].mean() + INK


def test_segment_loss_is_a_mean_over_the_pixels_of_each_canvas(segment: Segment) -> None:
    batch = first_batch(segment)
    torch.manual_seed(0)
    output = segment.model()(segment.inputs(batch))
    assert output.shape == (3, CLASSES, 12, 12)
    expected = -output.log_softmax(1).gather(1, batch[1][:, None]).flatten(1).mean(1)
    torch.testing.assert_close(segment.loss(output, batch), expected)


def test_segment_outputs_do_not_depend_on_the_rest_of_the_batch(segment: Segment) -> None:
    batch = first_batch(segment)
    model = segment.model().double()
    whole = model(batch[0].double())
    for index in range(3):
        torch.testing.assert_close(whole[index : index + 1], model(batch[0][index : index + 1].double()))


def test_mean_iou_equals_a_case_worked_out_by_hand() -> None:
    task = Segment(size=12)
    true = torch.zeros(2, 12, 12, dtype=torch.long)
    predicted = torch.zeros(2, 12, 12, dtype=torch.long)
    true[0, 0, :4] = 3  # 4 pixels of class 3, of which 2 are found
    predicted[0, 0, 2:8] = 3  # and 4 claimed in error: 2 / 8
    true[1, 5, :3] = 7  # 3 pixels of class 7, all found: 3 / 3
    predicted[1, 5, :3] = 7
    predicted[1, 9, 0] = 9  # claimed in error: 0 / 1
    # Background: 288 pixels less 7 are true, less 6 + 3 + 1 predicted; 276 are both.
    background = 276 / (281 + 278 - 276)
    logits = torch.nn.functional.one_hot(predicted, CLASSES).movedim(-1, 1).float()
    canvases = torch.zeros(2, 1, 12, 12)
    halves = [(logits[:1], [canvases[:1], true[:1]]), (logits[1:], [canvases[1:], true[1:]])]
    for pairs in ([(logits, [canvases, true])], halves):
        found = summarise(task, pairs)
        assert found["mean_iou"] == pytest.approx((2 / 8 + 1 + 0 + background) / 4, abs=1e-12)
        assert found["pixel_accuracy"] == pytest.approx(281 / 288, abs=1e-12)


@pytest.mark.parametrize(
    "wrong", [{"width": 6}, {"width": 0}, {"size": 10}, {"size": 8}, {"digits": 0}, {"size": 16.0}]
)
def test_wrong_arguments_of_segment_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(JobError, match=rf"task_args\.{name}=.*For example {name}=\d+") as refused:
        Segment(**wrong)
    Segment(**{name: int(str(refused.value).rpartition("=")[2])})  # the remedy is accepted


def test_held_out_files_depend_on_their_own_names_alone(tmp_path: Path) -> None:
    paths = [Path(f"folder/file{number}.py") for number in range(400)]
    assert 2 <= sum(map(is_held_out, paths)) <= 40
    for path in [*paths, Path("site-packages/x.py"), Path("folder/test/y.py"), Path("_sysconfigdata_z.py")]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"# {path}\n" * 9)
    found = find_sources(tmp_path)
    assert found == sorted(paths, key=str)
    task = ByteLM("1m", folder=str(tmp_path))
    for held_out, corpus in task.corpora.items():
        files = bytes(corpus.tolist()).split(b"\0")[1:-1]
        assert files == [(tmp_path / path).read_bytes() for path in found if is_held_out(path) == held_out]


def test_the_standard_library_gives_the_same_disjoint_corpora(bytelm: ByteLM) -> None:
    again = ByteLM("1m").corpora
    files: dict[bool, set[bytes]] = {}
    for held_out, corpus in bytelm.corpora.items():
        assert corpus.dtype == torch.uint8 and torch.equal(corpus, again[held_out])
        files[held_out] = set(corpus.numpy().tobytes().split(b"\0")) - {b""}
    assert len(files[True]) >= 5 and len(files[False]) >= 300
    assert not files[True] & files[False]


def test_windows_predict_each_byte_once() -> None:
    corpus = torch.arange(24, dtype=torch.uint8)
    windows = Windows(corpus, context=5)
    assert len(windows) == 4
    assert torch.cat([windows[i][1:] for i in range(4)]).tolist() == list(range(1, 21))
    assert torch.cat([windows[i][:-1] for i in range(4)]).tolist() == list(range(20))
    assert windows[1].data_ptr() == corpus[5:].data_ptr()  # a view: no copy of the corpus per window
    with pytest.raises(IndexError):
        windows[4]


def test_the_number_of_parameters_is_gpt2s_less_the_vocabulary() -> None:
    gpt2 = 124_439_808  # GPT-2 small with 50,257 tokens, tied
    assert SIZES["gpt2"].parameters == gpt2 - (50_257 - 256) * 768 == 86_039_040
    for size in ("1m", "10m", "25m"):
        assert SIZES[size].parameters == pytest.approx(float(size[:-1]) * 1e6, rel=0.1)
    # That formula against models that are real but for their depth, in which it is linear.
    for shape in SIZES.values():
        for layers in (1, 2):
            shallow = replace(shape, layers=layers)
            assert sum(weight.numel() for weight in GPT(shallow).parameters()) == shallow.parameters


@pytest.mark.parametrize("task, batch", [
    (ByteLM("1m"), torch.arange(2 * 20).view(2, 20)), (Segment(width=4, size=12), torch.rand(2, 1, 12, 12)),
])  # fmt: skip
def test_stages_one_after_the_other_are_the_model(task: Task, batch: Tensor) -> None:
    model: Any = task.model()
    value: Any = batch
    for part in task.stages(model):
        value = part(value)
    assert torch.equal(value, model(batch))


def test_initial_weights_are_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT(SIZES["1m"])
    for name, weight in model.named_parameters():
        if "norm" in name:
            expected = 1.0 if name.endswith("weight") else 0.0
            assert torch.all(weight == expected), name
        elif name.endswith("bias"):
            assert torch.all(weight == 0), name
        else:
            into_stream = name.endswith(("attended.weight", "contract.weight"))
            assert float(weight.detach().std()) == pytest.approx(0.02 / (6**0.5 if into_stream else 1), rel=0.05), name


def test_no_logit_sees_a_later_byte(bytelm: ByteLM) -> None:
    torch.manual_seed(0)
    model = bytelm.model().double()
    text = torch.randint(0, 256, (1, 40))
    changed = text.clone()
    changed[0, 25] += 1 if text[0, 25] < 255 else -1
    before, after = model(text), model(changed)
    assert torch.equal(before[0, :25], after[0, :25])
    assert not torch.isclose(before[0, 25:], after[0, 25:]).all(-1).any()


def test_a_window_is_scored_on_each_byte_after_its_first(bytelm: ByteLM) -> None:
    batch = first_batch(bytelm)
    assert batch.shape == (3, 129) and batch.dtype == torch.uint8
    torch.manual_seed(0)
    output = bytelm.model()(bytelm.inputs(batch))
    assert output.shape == (3, 128, 256)
    right = output.log_softmax(2).gather(2, batch[:, 1:, None].long())[..., 0]
    torch.testing.assert_close(bytelm.loss(output, batch), -right.mean(1))
    sure = 50.0 * torch.nn.functional.one_hot(batch[:, 1:].long(), 256)
    assert torch.all(bytelm.loss(sure, batch) < 1e-6)


def test_bits_per_byte_of_known_distributions(bytelm: ByteLM) -> None:
    batches = list(DataLoader(bytelm.eval_dataset(), batch_size=64))[:3]
    uniform = [(torch.zeros(*batch[:, 1:].shape, 256, dtype=torch.float64), batch) for batch in batches]
    assert summarise(bytelm, uniform)["bits_per_byte"] == pytest.approx(8, abs=1e-12)
    # The same for all bytes: 1/2 on a space, the rest spread evenly.
    logits = torch.full((256,), math.log(0.5 / 255), dtype=torch.float64)
    logits[ord(" ")] = math.log(0.5)
    one_for_all = [(logits.expand(*batch[:, 1:].shape, 256), batch) for batch in batches]
    share = float(torch.cat([batch[:, 1:].flatten() for batch in batches]).eq(ord(" ")).double().mean())
    expected = share + (1 - share) * math.log2(510)
    assert summarise(bytelm, one_for_all)["bits_per_byte"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", ["2m", "GPT2", 1, None])
def test_a_wrong_size_is_refused_with_the_right_ones(size: Any) -> None:
    with pytest.raises(JobError, match=r"task_args\.size=.*Use one of 1m, 10m, 25m, gpt2, 124m, 1.5b"):
        ByteLM(size)


def test_a_folder_without_enough_sources_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("pass\n")
    with pytest.raises(JobError, match=r"task_args\.folder=.*too few Python sources"):
        ByteLM(folder=str(tmp_path)).train_dataset()
    with pytest.raises(JobError, match=r"task_args\.folder=.*no such folder"):
        ByteLM(folder=str(tmp_path / "absent"))
