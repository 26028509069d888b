"""config.py: every setting is checked when given, and the phase is a function of the timestep."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from settings_table import PAGE, page_with_tables

from agentsd import AgentConfig, Phase
from agentsd.config import PRESET_NOTES, PRESETS, SETTINGS, make_config
from agentsd.fields import written
from agentsd.messages import did_you_mean, install_hint
from agentsd.patch import Settings


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("ratio", 1.2, ValueError),
        ("ratio", "abc", TypeError),
        ("ratio", True, TypeError),
        ("ratio", float("nan"), ValueError),
        ("ratio", 0.76, ValueError),  # above 1 − 1/2²
        ("early_ratio", -0.1, ValueError),
        ("early_ratio", "abc", TypeError),
        ("early_ratio", False, TypeError),
        ("early", -1, ValueError),
        ("early", "abc", TypeError),
        ("alpha", None, TypeError),
        ("broadcast_exponent", 5, ValueError),
        ("agent_ratio", 1.01, ValueError),
        ("agent_stride", 0, ValueError),
        ("agent_stride", 1, ValueError),
        ("agent_stride", 2.5, TypeError),
        ("merge_stride", (2, 0), ValueError),
        ("merge_stride", (2, 2, 2), ValueError),
        ("merge_stride", "22", TypeError),
        ("max_downsample", 3, ValueError),
        ("max_downsample", "all", ValueError),
        ("max_downsample", 1.0, TypeError),
        ("use_rand", 1, TypeError),
        ("merge_mlp", None, TypeError),
        ("upcast", "yes", TypeError),
        ("seed", -1, ValueError),
        ("late", "todo", ValueError),
        ("late", None, TypeError),
        ("agents", "pooling", ValueError),
        ("agents", True, TypeError),
        ("cache_interval", 51, ValueError),
        ("cache_interval", "auto", TypeError),
        ("cache_order", 2, ValueError),
        ("cache_order", True, TypeError),
        ("cache_depth", "all", ValueError),
        ("cache_depth", 11, ValueError),
        ("max_agents", 0, ValueError),
        ("max_agents", 256.0, TypeError),
        ("max_keys", 0, ValueError),
        ("max_keys", True, TypeError),
        ("match_tile", 1, ValueError),
        ("match_tile", True, TypeError),
        ("seed", 1.5, TypeError),
    ],
)
def test_bad_values_name_field_and_value(field, value, error):
    with pytest.raises(error, match=f"{field}=") as caught:
        AgentConfig(**{field: value})
    assert repr(value) in str(caught.value)


def test_ratio_limit_follows_the_stride_in_use():
    assert AgentConfig(ratio=0.75).ratio == 0.75
    assert AgentConfig(ratio=0.9, early=1.0).ratio == 0.9  # only the agents' 4 × 4 grid is ever used
    assert AgentConfig(ratio=0.9, merge_stride=4).ratio == 0.9
    with pytest.raises(ValueError, match="0.9375.*agent_stride=4"):
        AgentConfig(ratio=0.94, early=1.0)
    with pytest.raises(ValueError, match="0.5 of the tokens.*merge_stride=\\(1, 2\\)"):
        AgentConfig(ratio=0.6, merge_stride=(1, 2))

    assert AgentConfig(ratio=0.7, early_ratio=0.9).early_ratio == 0.9
    with pytest.raises(ValueError, match="^early_ratio=0.95: at most 0.9375.*lower early_ratio or raise agent_stride"):
        AgentConfig(early_ratio=0.95)
    with pytest.raises(ValueError, match="^ratio=0.9: at most 0.75.*merge_stride=2"):
        AgentConfig(ratio=0.9, early_ratio=0.0)
    for late in ("downsample", "full"):
        assert AgentConfig(ratio=0.9, late=late).ratio == 0.9  # the later steps merge nothing


@pytest.mark.parametrize("grid", [(64, 64), (96, 96), (128, 128), (256, 256), (64, 96), (19, 13), (4, 400), (3, 64)])
@pytest.mark.parametrize("max_agents", [1, 7, 64, 256])
def test_cells_grow_until_no_more_than_max_agents_are_left(grid, max_agents):
    config = AgentConfig(max_agents=max_agents)
    num_tokens = grid[0] * grid[1]
    rows, columns = config.stride(Phase.AGENT, grid)
    cells = (grid[0] // rows) * (grid[1] // columns)
    if grid[0] < 4:
        assert cells == 0 and (rows, columns) == (4, 4)  # such a layer runs unpatched, with or without a limit
        return
    assert 1 <= cells <= max_agents
    agents = num_tokens - config.num_merged_for_agents(num_tokens, num_tokens - cells)
    assert agents == min(max_agents, max(cells, agents)) and agents <= max_agents
    smaller = (rows - 4, columns - 4)
    if min(smaller) >= 4 and rows < grid[0] and columns < grid[1]:  # no larger than needed
        assert (grid[0] // smaller[0]) * (grid[1] // smaller[1]) > max_agents
    assert config.stride(Phase.MERGE, grid) == (2, 2)


@pytest.mark.parametrize("grid", [(64, 64), (96, 96), (128, 128), (256, 256), (64, 96), (19, 13), (4, 400)])
@pytest.mark.parametrize("max_keys", [1, 100, 1024])
def test_cells_grow_until_no_more_than_max_keys_are_left(grid, max_keys):
    rows, columns = AgentConfig(late="downsample", max_keys=max_keys).stride(Phase.MERGE, grid)
    assert 1 <= (grid[0] // rows) * (grid[1] // columns) <= max_keys
    if (rows, columns) != (2, 2) and rows < grid[0] and columns < grid[1]:  # no larger than needed
        assert (grid[0] // (rows - 2)) * (grid[1] // (columns - 2)) > max_keys
    assert AgentConfig(late="downsample", max_keys=max_keys).stride(Phase.AGENT, grid) == (4, 4)
    assert AgentConfig(max_keys=max_keys).stride(Phase.MERGE, grid) == (2, 2)  # merging has no keys to limit


def test_is_a_plain_hashable_value():
    assert AgentConfig(merge_stride=[2, 4]) == AgentConfig(merge_stride=(2, 4))
    assert hash(AgentConfig()) == hash(AgentConfig(ratio=0.4))
    assert AgentConfig(merge_stride=(2, 4)).stride(Phase.MERGE) == (2, 4)
    assert AgentConfig().stride(Phase.AGENT) == (4, 4)
    with pytest.raises(AttributeError):
        AgentConfig().ratio = 0.5


@pytest.mark.parametrize(
    "early, timestep, phase",
    [
        (0.4, 999, Phase.AGENT),
        (0.4, 600, Phase.AGENT),
        (0.4, 599.9, Phase.MERGE),
        (0.4, 1, Phase.MERGE),
        (0.0, 1000, Phase.MERGE),
        (1.0, 0, Phase.AGENT),
    ],
)
def test_phase(early, timestep, phase):
    assert AgentConfig(early=early).phase_at(timestep) is phase


@pytest.mark.parametrize(
    "settings, acts",
    [({}, True), ({"ratio": 0.0}, False), ({"late": "full"}, False), ({"late": "downsample", "ratio": 0.0}, True)],
)
def test_what_acts_in_the_later_steps(settings, acts):
    config = AgentConfig(**settings)
    assert config.acts_in(Phase.MERGE) is acts and config.acts_in(Phase.AGENT)


@pytest.mark.parametrize("horizon", [1000, 100])
def test_the_first_agent_timestep_belongs_to_the_agents(horizon):
    """Computed in floating point, (1 − 0.7) · 1000 is more than 300."""
    for k in range(1, horizon + 1):
        config = AgentConfig(early=k / horizon)
        assert config.first_agent_timestep(horizon) == horizon - k
        assert config.phase_at(horizon - k, horizon) is Phase.AGENT
        assert config.phase_at(horizon - k - 1, horizon) is Phase.MERGE


def test_phase_scales_with_the_training_length():
    assert AgentConfig().phase_at(60, num_train_timesteps=100) is Phase.AGENT
    assert AgentConfig().phase_at(59, num_train_timesteps=100) is Phase.MERGE


def test_default_agents_are_one_sixteenth():
    """Upstream's defaults never activate agents (r_agent below the number of tokens kept); ours must."""
    assert 4096 - AgentConfig().num_merged_for_agents(4096, num_src=4096 - 256) == 256


def test_importing_the_light_part_loads_no_torch():
    code = "import sys, agentsd; agentsd.AgentConfig(ratio=0.3); assert 'torch' not in sys.modules and agentsd.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_setting_is_described_once():
    """One sentence or two, an error that says what is allowed, and the same fields for type checkers."""
    assert list(Settings.__annotations__) == list(SETTINGS)
    for name, setting in SETTINGS.items():
        assert setting.help[0].isupper() or setting.help[0].isdigit()
        assert (
            setting.help.endswith(".")
            and 40 < len(setting.help) < 260
            and f"{name}: {setting.help}" in AgentConfig.__doc__
        )
        with pytest.raises((TypeError, ValueError)) as caught:
            AgentConfig(**{name: object})
        assert str(caught.value).startswith(f"{name}={object!r}: must be {setting.allowed}")


def test_the_page_has_the_table_of_the_settings():
    text = PAGE.read_text("utf-8")
    assert page_with_tables(text) == text, "run python tests/support/settings_table.py"


def allowed_values(setting):
    """Some values that a setting can have, its bounds among them."""
    if setting.kind == "flag":
        values = [True, False]
    elif setting.kind == "cell":
        values = [2, 7, (2, 4), (1, 2)]
    else:
        values = [value for value in (setting.low, setting.high) if value is not None] + list(setting.choices)
    return values + ([None] if setting.optional else [])


@pytest.mark.parametrize("name", SETTINGS)
def test_text_and_value_of_a_setting_are_the_same(name):
    setting = SETTINGS[name]
    for value in allowed_values(setting):
        assert setting.check(name, value) == value == setting.read(written(value))
        assert type(setting.check(name, value)) is type(setting.check(name, setting.read(written(value))))
    for bound, beyond in ((setting.low, -1), (setting.high, 1)):
        if bound is not None:
            with pytest.raises(ValueError, match=f"^{name}={bound + beyond}: must be"):
                setting.check(name, bound + beyond)
    for text in ("much", "", "1x", "0x9", "1e", "--"):
        with pytest.raises((ValueError, TypeError), match=f"^{name}="):
            setting.check(name, setting.read(text))


def test_integers_and_numbers_of_numpy_are_kept_as_plain_ones():
    config = AgentConfig(
        ratio=np.float32(0.5), agent_stride=(np.int64(2), 4), max_agents=np.int32(9), max_downsample=np.int64(2),
        cache_order=np.int64(1), cache_depth=np.uint8(2), seed=np.int64(3),
    )  # fmt: skip
    assert json.loads(json.dumps(dataclasses.asdict(config)))["agent_stride"] == [2, 4]
    assert {type(value) for value in dataclasses.asdict(config).values()} <= {int, float, bool, str, tuple, type(None)}


def test_agents_from_a_grid_have_nothing_merged_beside_them():
    config = AgentConfig(agents="grid", early_ratio=0.5, ratio=0.3)
    assert config.ratio_in(Phase.AGENT) == 0 and config.ratio_in(Phase.MERGE) == 0.3
    assert AgentConfig(agents="grid", late="full", ratio=0.99).agents == "grid"  # no cell bounds the ratio


def test_presets_are_possible_and_described():
    assert make_config(preset="paper") == AgentConfig()
    for name, preset in PRESET_NOTES.items():
        assert PRESETS[name] == preset.fields and preset.help.endswith(".")
        make_config(preset=name)
    cached = make_config(preset="cache")
    assert cached.cache_interval == 3 and not cached.acts_in(Phase.MERGE) and cached.phase_at(999) is Phase.MERGE


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rato": 0.3}, r"unknown setting rato \(did you mean ratio\?\); the settings are ratio, early"),
        ({"cache_intervall": 3, "ratio": 0.3}, "cache_intervall .did you mean cache_interval"),
        ({"preset": ["fast"]}, "preset=.'fast'.: must be one of paper, "),
        ({"preset": "fats"}, "preset='fats': must be one of paper, .*did you mean fast"),
        ({"nothing_like_it_at_all": 1}, "unknown setting nothing_like_it_at_all; the settings"),
    ],
)
def test_a_misspelt_setting_is_answered_with_the_one_meant(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_config(**given)


def test_sentences_that_several_modules_say():
    assert (
        did_you_mean("early_ration", SETTINGS) == " (did you mean early_ratio?)" and did_you_mean("zzz", SETTINGS) == ""
    )
    assert install_hint("app") == 'pip install -e ".[app]" in the folder that agentsd was cloned to'
