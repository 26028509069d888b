"""The law of the patch, kind by kind: the result is what the settings say, or one warning or error says why not."""

from __future__ import annotations

import copy
import gc
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy
import pytest
import tomesd
import torch
from compat_matrix import CLEAR_ERROR, WARNS, compat
from conftest import SD_BETAS, call_unet, draw, make_pipeline, make_unet
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from test_compat_adapters import load_ip_adapter
from test_compat_pipelines import make_motion_adapter

import agentsd
from agentsd import Phase
from agentsd.patch import get_patch
from agentsd.unet.layers import own_latent_size

GROUP = "Right, or told"


def told(call, match: str):
    """Run `call` twice: one warning of agentsd the first time, that matches; none the second time. Its result."""
    with pytest.warns(UserWarning, match=match) as caught:
        call()
    assert sum(str(warning.message).startswith("agentsd") for warning in caught) == 1
    return untold(call)


def untold(call):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="agentsd")
        return call()


def outcomes(unet) -> set[str]:
    return set(get_patch(unet).last_call.outcomes.values())


# --- bypassed without touching the processor --------------------------------------------------------------------------


def attention_by_hand(attn):
    """An attention that a tool puts in place of a layer's forward, as T-GATE, prompt-to-prompt and MasaCtrl do."""

    def forward(hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)

    return forward


def replace_attention_forward(unet, monkeypatch):
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.forward = attention_by_hand(module)


def replace_attention_class_forward(unet, monkeypatch):
    monkeypatch.setattr(
        Attention,
        "forward",
        lambda attn, hidden, encoder_hidden_states=None, **_: attention_by_hand(attn)(hidden, encoder_hidden_states),
    )


def replace_block_forward(unet, monkeypatch):
    def forward_of(block):
        def forward(hidden_states, encoder_hidden_states=None, **kwargs):
            attention = attention_by_hand(block.attn1)(block.norm1(hidden_states))
            hidden_states = hidden_states + attention
            hidden_states = hidden_states + block.attn2(block.norm2(hidden_states), encoder_hidden_states)
            return hidden_states + block.ff(block.norm3(hidden_states))

        return forward

    for module in unet.modules():
        if isinstance(module, diffusers.models.attention.BasicTransformerBlock):
            module.forward = forward_of(module)


def replace_attention_module(unet, monkeypatch):
    class OtherAttention(torch.nn.Module):
        def __init__(self, attn):
            super().__init__()
            self.attn = attn

        def forward(self, hidden_states, encoder_hidden_states=None, **kwargs):
            return attention_by_hand(self.attn)(hidden_states)

    for module in list(unet.modules()):
        if isinstance(module, diffusers.models.attention.BasicTransformerBlock):
            module.attn1 = OtherAttention(module.attn1)


@pytest.mark.parametrize(
    "replace, cause",
    [
        pytest.param(
            replace_attention_forward,
            "attention_by_hand",
            marks=compat(
                GROUP, "Attention.forward replaced (T-GATE, prompt-to-prompt)", WARNS, "the layer is bypassed; says so"
            ),
        ),
        (replace_attention_class_forward, "the class Attention has the forward"),
        (replace_block_forward, "replace_block_forward"),
        (replace_attention_module, "OtherAttention"),
    ],
)
def test_bypassed_layers_are_noticed(replace, cause, monkeypatch):
    unet = make_unet()
    plain = call_unet(unet)
    agentsd.apply_patch(unet)
    assert not torch.equal(call_unet(unet), plain) and outcomes(unet) == {"active"}
    replace(unet, monkeypatch)
    out = told(lambda: call_unet(unet), f"3 of 3 patched layers were bypassed.*{cause}.*remove_patch")
    assert (out - plain).abs().max() < 1e-5
    assert all(outcome.startswith("bypassed") for outcome in outcomes(unet))


def test_bypassed_stage_is_noticed():
    """A layer that the very first call never reaches."""
    unet = make_unet()
    agentsd.apply_patch(unet)
    unet.down_blocks[0].attentions[0] = Skip()
    told(lambda: call_unet(unet), "1 of 3 patched layers were not reached by a whole UNet call")


class Skip(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return (hidden_states,)


@compat(GROUP, "A block's forward called directly", WARNS, "the layer runs unpatched; says so")
def test_block_forward_called_directly_is_told():
    unet = make_unet()
    plain = call_unet(unet)
    agentsd.apply_patch(unet)

    class PastHooks(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return self.block.forward(*args, **kwargs)

    transformer = unet.down_blocks[0].attentions[0]
    transformer.transformer_blocks[0] = PastHooks(transformer.transformer_blocks[0])
    out = told(lambda: call_unet(unet), "1 of 3 .*its block's forward was called directly")
    assert not torch.equal(out, plain)  # the other two layers are patched


# --- a timestep per sample --------------------------------------------------------------------------------------------


def call_with(unet, timesteps, size=(16, 16), keep=slice(None), **extra):
    """A batch of len(timesteps) samples; `keep` calls the UNet with some of them alone."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(len(timesteps), 4, *size, generator=generator)
    text = torch.randn(len(timesteps), 7, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(sample[keep], torch.tensor(timesteps)[keep], text[keep], **extra).sample


@compat(GROUP, "A timestep per sample (StreamDiffusion, ParaDiGMS, training)", note="each sample follows its own phase")
@pytest.mark.parametrize(
    "settings", [{}, {"late": "downsample"}, {"late": "full"}, {"use_rand": False}, {"match_tile": 8, "ratio": 0.2}]
)
@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [999, 901, 850, 850], [1, 999, 1, 999]])
def test_mixed_timesteps_give_each_sample_what_it_gets_alone(timesteps, settings):
    unet = make_unet()
    agentsd.apply_patch(unet, **settings)
    together = untold(lambda: call_with(unet, timesteps))
    for i in range(len(timesteps)):
        alone = call_with(unet, timesteps, keep=slice(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    agentsd.remove_patch(unet)
    plain = call_with(unet, timesteps)
    for one, unpatched, timestep in zip(together, plain, timesteps):
        unchanged = settings.get("late") == "full" and timestep < 600
        assert ((one - unpatched).abs().max() < 1e-5) == unchanged


def test_mixed_timesteps_with_parts_merged_elsewhere_say_so():
    unet = make_unet()
    agentsd.apply_patch(unet)
    expected = call_with(unet, [999, 100])
    agentsd.apply_patch(unet, merge_mlp=True, merge_crossattn=True)
    out = told(lambda: call_with(unet, [999, 100]), "samples of both phases")
    torch.testing.assert_close(out, expected)
    assert not torch.equal(untold(lambda: call_with(unet, [999, 990])), call_with(unet, [999, 100]))


def test_mixed_timesteps_of_videos_cover_all_frames():
    """AnimateDiff's frames are samples of their own inside the spatial layers."""
    unet = diffusers.UNetMotionModel.from_unet2d(make_unet("sd15"), make_motion_adapter())
    agentsd.apply_patch(unet)
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 3, 16, 16, generator=generator), torch.randn(2, 7, 32, generator=generator)

    def call(keep, timesteps):
        with torch.no_grad():
            return unet(sample[keep], torch.tensor(timesteps), text[keep].repeat_interleave(3, 0)).sample

    for timesteps in ([900, 100], [900, 800]):
        together = untold(lambda timesteps=timesteps: call(slice(None), timesteps))
        for i, timestep in enumerate(timesteps):
            torch.testing.assert_close(together[i : i + 1], call(slice(i, i + 1), [timestep]), atol=1e-4, rtol=1e-4)


def test_mixed_timesteps_train_agents_at_any_batch_size():
    """40 % of the samples of a training batch are in the agent phase, whatever the others are."""
    unet = make_unet()
    agentsd.apply_patch(unet)
    timesteps = torch.randint(0, 1000, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    assert 0 < sum(t >= 600 for t in timesteps) < 8
    rows = []
    handle = get_patch(unet).layers[0].attn.to_k.register_forward_hook(lambda m, a, out: rows.append(out.shape[0]))
    call_with(unet, timesteps)
    handle.remove()
    assert sorted(rows) == sorted([sum(t >= 600 for t in timesteps), sum(t < 600 for t in timesteps)])


# --- outside a call of the UNet ---------------------------------------------------------------------------------------


@compat(GROUP, "unet.forward called directly", WARNS, "runs unpatched; says so")
def test_direct_forward_uses_nothing_of_an_earlier_call():
    unet = make_unet()
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)
    with torch.no_grad():
        plain = unet(sample, 100, text).sample
        agentsd.apply_patch(unet)
        call_unet(unet, timestep=900)

        def direct():
            return unet.forward(sample, 100, text).sample

        assert torch.equal(told(direct, "outside a call of its UNet"), plain)


@compat(GROUP, "torch.jit.trace and torch.export of a patched UNet", CLEAR_ERROR, "says to remove the patch or compile")
@pytest.mark.parametrize("strict", [None, False, True])
def test_traced_or_exported_it_refuses_in_one_sentence(strict):
    unet = make_unet()
    agentsd.apply_patch(unet)
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor(900), torch.randn(1, 7, 32))
    with torch.no_grad(), pytest.raises(Exception, match=r"agentsd(?s:.)*remove_patch") as caught:
        if strict is None:
            torch.jit.trace(lambda *args: unet(*args).sample, inputs)
        else:
            torch.export.export(unet, inputs, strict=strict)
    if not strict:
        assert caught.type is RuntimeError and "would freeze" in str(caught.value)
    assert call_unet(unet).isfinite().all()  # and the refusal leaves the UNet usable


# --- another schedule -------------------------------------------------------------------------------------------------


def test_schedule_of_another_length_set_after_the_patch_is_followed():
    pipe = agentsd.apply_patch(make_pipeline(scheduler=DDIMScheduler(**SD_BETAS)))
    pipe.scheduler = DDIMScheduler(**{**SD_BETAS, "num_train_timesteps": 250})
    phases = []
    layer = get_patch(pipe).layers[0].attn
    layer.register_forward_pre_hook(lambda *_: phases.append(get_patch(pipe).call.phase))
    untold(lambda: draw(pipe, steps=10))
    assert phases == [Phase.AGENT] * 4 + [Phase.MERGE] * 6
    assert agentsd.describe(pipe).early_timestep == 150
    twin = copy.deepcopy(pipe)
    twin.scheduler = DDIMScheduler(**{**SD_BETAS, "num_train_timesteps": 500})
    assert (agentsd.describe(twin).early_timestep, agentsd.describe(pipe).early_timestep) == (300, 150)


def test_schedule_of_noise_levels_set_after_the_patch_is_told():
    pipe = agentsd.apply_patch(make_pipeline(scheduler=DDIMScheduler(**SD_BETAS)))
    pipe.scheduler = diffusers.EDMEulerScheduler(num_train_timesteps=1000)
    told(lambda: draw(pipe, steps=3), "counts noise levels")


@pytest.mark.parametrize(
    "timesteps, message", [((1.0, 0.7, 0.3), "begins at timestep 1 .*scaled"), ((1999.0,), "beyond the 1000 timesteps")]
)
def test_schedule_that_a_bare_unet_cannot_know_is_told(timesteps, message):
    unet = agentsd.apply_patch(make_unet())
    told(lambda: [call_unet(unet, timestep=torch.tensor(timestep)) for timestep in timesteps], message)


def test_schedule_that_ends_near_zero_is_not_mistaken():
    unet = agentsd.apply_patch(make_unet())
    untold(lambda: [call_unet(unet, timestep=torch.tensor(timestep)) for timestep in (999.0, 500.0, 0.4)])


def test_schedule_does_not_keep_the_pipeline_alive():
    import weakref

    pipe = agentsd.apply_patch(make_pipeline())
    unet, gone = pipe.unet, weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None and call_unet(unet).isfinite().all()


# --- merge_crossattn where cross-attention knows places ---------------------------------------------------------------


def test_cross_attention_that_knows_places_is_not_merged():
    from diffusers.image_processor import IPAdapterMaskProcessor

    pipe = make_pipeline()
    load_ip_adapter(pipe)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    masks = IPAdapterMaskProcessor().preprocess(mask, height=128, width=128)
    embeds = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(13))

    def run():
        return draw(
            pipe,
            ip_adapter_image_embeds=[embeds],
            cross_attention_kwargs={"ip_adapter_masks": [masks.reshape(1, 1, 128, 128)]},
        )

    agentsd.apply_patch(pipe)
    expected = untold(run)
    agentsd.apply_patch(pipe, merge_crossattn=True)
    out = told(run, "cross-attention is not merged, as the processor IPAdapterAttnProcessor2_0 may depend on .* places")
    torch.testing.assert_close(out, expected)
    assert outcomes(pipe) == {"active"} and len(get_patch(pipe).last_call.notes) == 3


# --- rebuilt and reset ------------------------------------------------------------------------------------------------


@compat(GROUP, "AnimateDiffPipeline.from_pipe of a patched pipeline", WARNS, "asks to patch the new pipeline")
def test_rebuilt_unet_is_told():
    pipe = agentsd.apply_patch(make_pipeline())
    with pytest.warns(UserWarning, match="agentsd: the UNet that is built here.*apply_patch on the new pipeline"):
        video = diffusers.AnimateDiffPipeline.from_pipe(pipe, motion_adapter=make_motion_adapter())
    assert get_patch(video) is None
    untold(lambda: pipe.unet.state_dict())
    untold(lambda: diffusers.ControlNetModel.from_unet(pipe.unet))
    agentsd.remove_patch(pipe)
    untold(lambda: diffusers.UNetMotionModel.from_unet2d(pipe.unet, make_motion_adapter()))


def test_set_default_attn_processor_says_what_to_do():
    unet = agentsd.apply_patch(make_unet())
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(get_patch(unet).layers[0].attn.processor)
    with pytest.raises(ValueError, match="agentsd.remove_patch") as caught:
        unet.set_default_attn_processor()
    assert " object at 0x" not in str(caught.value)


def make_foreign():
    """A processor of another library with the name of diffusers' own, as xFormers forks and training tools have."""
    return type("AttnProcessor2_0", (AttnProcessor2_0,), {"__module__": "other_library.attention"})()


def follow_the_remedy(message: str, unet) -> None:
    """Run the code that a warning names, literally."""
    code = message.partition("`")[2].partition("`")[0]
    assert code.startswith("for name, module in unet.named_modules()")
    exec(code.replace(": if", ":\n  if"), {"unet": unet, "AttnProcessor2_0": AttnProcessor2_0})


def test_foreign_processor_of_the_same_name_is_named_and_its_remedy_keeps_ip_adapter():
    pipe = make_pipeline()
    load_ip_adapter(pipe)
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(make_foreign())
    with pytest.warns(UserWarning, match="other_library.attention.AttnProcessor2_0 is not one of diffusers'") as caught:
        agentsd.apply_patch(pipe)
    follow_the_remedy(str(caught[0].message), pipe.unet)
    untold(lambda: agentsd.apply_patch(pipe))
    assert len(get_patch(pipe).layers) == 3
    attn2 = [type(p).__name__ for name, p in pipe.unet.attn_processors.items() if "attn2" in name]
    assert set(attn2) == {"IPAdapterAttnProcessor2_0"}


def test_foreign_processor_set_after_the_patch_has_the_same_remedy():
    unet = agentsd.apply_patch(make_unet())
    patched = call_unet(unet)
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(make_foreign())
    with pytest.warns(UserWarning, match="replaced by other_library.attention.AttnProcessor2_0") as caught:
        call_unet(unet)
    follow_the_remedy(str(caught[0].message), unet)
    agentsd.apply_patch(unet)
    assert torch.equal(untold(lambda: call_unet(unet)), patched)


def test_tomesd_after_the_patch_is_one_warning():
    unet = agentsd.apply_patch(make_unet())
    tomesd.apply_patch(unet, ratio=0.5)
    told(lambda: call_unet(unet), "use one of them")
    assert all("16×16 grid" in outcome for outcome in outcomes(unet))


# --- compiled: many sizes and ratios ----------------------------------------------------------------------------------

# torch 2.8 takes the numbers of hooks for constants, so that each apply_patch makes new graphs there: room for two.
ROOMY = torch.__version__ >= "2.9"
SIZES = [(16, 16), (24, 16), (16, 24), (32, 32), (20, 12), (13, 19) if ROOMY else (28, 20), (40, 24), (8, 8)]
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.0] if ROOMY else [0.1, 0.5]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            how,
            marks=compat(
                GROUP,
                f"Eight sizes, seven ratios, unet.{how}(fullgraph=True)",
                note="8 graphs; torch 2.8 makes new ones at each apply_patch",
            ),
        )
        for how in ("compile", "compile_repeated_blocks")
    ],
)
def test_compiled_for_eight_sizes_and_seven_ratios(how, fresh_dynamo):
    """No graph for each of them: torch's limit of 8 stands, and the outputs are those of eager mode."""
    # Repeated blocks share their graphs, so there must be several; of a whole UNet one patched layer shows the same.
    up = "UpBlock2D" if how == "compile" else "CrossAttnUpBlock2D"
    unet = make_unet(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=(up,), mid_block_type=None
    )
    calls = [({}, size) for size in SIZES] + [({"ratio": ratio}, (16, 16)) for ratio in RATIOS]

    def run():
        settings, outputs = None, []
        for new_settings, size in calls:
            if new_settings != settings:
                agentsd.apply_patch(unet, **(settings := new_settings))
            outputs += [call_unet(unet, timestep=torch.tensor(timestep), size=size) for timestep in (900, 100)]
        return outputs

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager = run()
    getattr(unet, how)(fullgraph=True, backend=backend)
    for one, expected in zip(untold(run), eager):
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-4)
    assert len(graphs) <= 8


def test_compiled_mixed_timesteps_need_one_graph(fresh_dynamo):
    unet = make_unet(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )  # fmt: skip
    agentsd.apply_patch(unet)
    batches = [[999, 749, 499, 249], [999, 100, 99, 98], [5, 6, 700, 3]]
    eager = [call_with(unet, timesteps) for timesteps in batches]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    unet.compile(fullgraph=True, backend=backend)
    for timesteps, expected in zip(batches, eager):
        torch.testing.assert_close(call_with(unet, timesteps), expected, atol=1e-5, rtol=1e-4)
    assert len(graphs) <= 5


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_that_are_refused_change_nothing_for_the_first():
    """The refused call ends while the first one is inside a block: its input must still be there."""
    unet = agentsd.apply_patch(make_unet())
    expected = call_unet(unet)
    inside, go_on = threading.Event(), threading.Event()

    def wait_inside(*_):
        if not inside.is_set():
            inside.set()
            assert go_on.wait(60)

    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    handle = block.norm1.register_forward_pre_hook(wait_inside)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(untold, lambda: call_unet(unet))
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="two threads"):
            call_unet(unet)
        go_on.set()
        assert torch.equal(first.result(), expected)
    handle.remove()


def test_threads_may_call_after_an_exception_before_a_compiled_call(fresh_dynamo):
    unet = agentsd.apply_patch(make_unet())
    expected = call_unet(unet)
    unet.compile(backend="eager")
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError):
        pool.submit(unet, torch.randn(1, 4, 16, 16)).result()  # no timestep: it raises while the call is prepared
    torch.testing.assert_close(call_unet(unet), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ends", [True, False], ids=["thread-ended", "thread-outside"])
def test_threads_may_call_after_ctrl_c_inside_the_unet(ends):
    """torch runs no hook after a KeyboardInterrupt, so the claim stays behind, in a thread that ended or goes on."""
    unet = agentsd.apply_patch(make_unet())
    expected = call_unet(unet)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = unet.conv_out.register_forward_pre_hook(interrupt)
    release = threading.Event()
    interrupted = threading.Event()

    def run():
        try:
            call_unet(unet)
        except KeyboardInterrupt:
            interrupted.set()
        if not ends:
            release.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    assert interrupted.wait(60)
    if ends:
        thread.join()
    handle.remove()
    assert torch.equal(untold(lambda: call_unet(unet)), expected)
    release.set()
    thread.join()


# --- gradient checkpointing after the patch ---------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["removed", "replaced"])
def test_checkpointing_backward_after_the_with_block(then):
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with agentsd.patched(unet, merge_mlp=True):
            sample, text = torch.ones(2, 4, 16, 16), torch.ones(2, 7, 32)
            output = unet(sample + torch.arange(256.0).view(16, 16), 900, text).sample
        if then == "replaced":
            agentsd.apply_patch(unet, ratio=0.1)
        output.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
        if then == "replaced":
            assert get_patch(unet).config.ratio == 0.1
            agentsd.remove_patch(unet)
        assert get_patch(unet) is None
        for module in unet.modules():
            assert not module._forward_pre_hooks and not module._forward_hooks and "_agentsd" not in vars(module)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# --- small things -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, expected", [(16, (16, 16)), ((16, 24), (16, 24)), ([8, 12], (8, 12)), (None, (64, 64))])
def test_own_size_is_worked_out_in_one_place(size, expected):
    unet = make_unet(sample_size=size)
    assert own_latent_size(unet) == expected
    report = agentsd.describe(agentsd.apply_patch(unet))
    assert (report.height, report.width) == (8 * expected[0], 8 * expected[1])


def test_numpy_integers_can_be_written_as_json():
    config = agentsd.AgentConfig(
        seed=numpy.int64(3), max_downsample=numpy.int32(2), agent_stride=numpy.int64(4), max_agents=numpy.int64(9),
        ratio=numpy.float32(0.25),
    )  # fmt: skip
    assert json.loads(json.dumps(vars(config)))["seed"] == 3
