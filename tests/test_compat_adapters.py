"""Compatibility matrix, adapters and editors: what else people put on the UNet, before and after the patch."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import diffusers
import pytest
import tomesd
import torch
from compat_matrix import CLEAR_ERROR, WARNS, Row, check_row, compat, parametrize, record_attention
from conftest import SD_BETAS, draw, make_pipeline
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from test_compat_pipelines import make_pipe, make_sdxl

import agentsd
from agentsd.patch import get_patch

GROUP = "Adapters and editors"


def make_ddim():
    return make_pipeline(scheduler=DDIMScheduler(**SD_BETAS))


def lora_weights(pipe, rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA over all attention projections of the UNet, strong enough to be seen."""
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            weights[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) / 5
    return weights


def load_lora(pipe) -> None:
    pipe.load_lora_weights(lora_weights(pipe), adapter_name="test")


def load_ip_adapter(pipe) -> None:
    generator = torch.Generator().manual_seed(12)
    unet = pipe.unet
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    attention = {}
    for index, name in enumerate(names):  # diffusers numbers the cross-attention layers 1, 3, 5, …
        shape = unet.get_submodule(name).to_k.weight.shape
        attention[f"{2 * index + 1}.to_k_ip.weight"] = torch.randn(shape, generator=generator)
        attention[f"{2 * index + 1}.to_v_ip.weight"] = torch.randn(shape, generator=generator)
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * width, 16, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    weights = {"image_proj": projection, "ip_adapter": attention}
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)


def draw_with_image_prompt(pipe) -> torch.Tensor:
    image_embeds = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(13))  # without and with the image
    return draw(pipe, ip_adapter_image_embeds=[image_embeds])


def load_textual_inversion(pipe) -> None:
    embedding = torch.randn(1, 32, generator=torch.Generator().manual_seed(14))
    pipe.load_textual_inversion({"<cat>": embedding}, token="<cat>")


def enable_deepcache(pipe) -> None:
    deepcache = pytest.importorskip("DeepCache", reason="pip install DeepCache")
    helper = deepcache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()


def use_and_remove_tomesd(pipe) -> None:
    tomesd.apply_patch(pipe, ratio=0.5)
    tomesd.remove_patch(pipe)


def set_processors(processor_class):
    return lambda pipe: pipe.unet.set_attn_processor(processor_class())


def in_turn(*steps):
    def run(pipe):
        for step in steps:
            step(pipe)

    return run


def call(method: str, *args, **kwargs):
    return lambda pipe: getattr(pipe, method)(*args, **kwargs)


def make_pag(layers="mid"):
    return make_pipe(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=layers)


CALL_AGAIN = "says so once; active again after apply_patch"

ROWS = [
    Row("LoRA loaded before the patch", make_pipeline, before=load_lora),
    Row("LoRA loaded after the patch", make_pipeline, after=load_lora),
    Row("LoRA on SDXL", make_sdxl, before=load_lora),
    Row("LoRA fused", make_pipeline, before=load_lora, after=call("fuse_lora")),
    Row(
        "LoRA fused and unfused",
        make_pipeline,
        before=in_turn(load_lora, call("fuse_lora")),
        after=call("unfuse_lora"),
    ),
    Row("LoRA scaled by set_adapters", make_pipeline, before=load_lora, after=call("set_adapters", "test", 0.5)),
    Row("LoRA unloaded", make_pipeline, before=load_lora, after=call("unload_lora_weights")),
    Row("IP-Adapter loaded before the patch", make_pipeline, draw_with_image_prompt, before=load_ip_adapter),
    Row("IP-Adapter loaded after the patch", make_pipeline, draw_with_image_prompt, after=load_ip_adapter),
    Row("IP-Adapter unloaded", make_pipeline, before=load_ip_adapter, after=call("unload_ip_adapter")),
    Row("Textual inversion", make_pipeline, partial(draw, prompt="a <cat>"), after=load_textual_inversion),
    Row("fuse_qkv_projections before the patch", make_pipeline, before=call("fuse_qkv_projections")),
    Row(
        "fuse_qkv_projections after the patch",
        make_pipeline,
        after=call("fuse_qkv_projections"),
        status=WARNS,
        note=CALL_AGAIN,
    ),
    Row(
        "unfuse_qkv_projections",
        make_pipeline,
        before=call("fuse_qkv_projections"),
        after=call("unfuse_qkv_projections"),
        status=WARNS,
        note=CALL_AGAIN,
    ),
    Row("Attention slicing before the patch", make_pipeline, before=call("enable_attention_slicing")),
    Row(
        "Attention slicing after the patch",
        make_pipeline,
        after=call("enable_attention_slicing"),
        status=WARNS,
        note=CALL_AGAIN,
    ),
    Row("set_attn_processor before the patch", make_pipeline, before=set_processors(AttnProcessor)),
    Row(
        "set_attn_processor after the patch",
        make_pipeline,
        after=set_processors(AttnProcessor2_0),
        status=WARNS,
        note=CALL_AGAIN,
    ),
    Row("FreeU", make_pipeline, after=call("enable_freeu", s1=0.9, s2=0.2, b1=1.5, b2=1.6)),
    Row("PAG on layers that are not patched", make_pag, partial(draw, pag_scale=3.0)),
    Row(
        "PAG on a patched layer",
        partial(make_pag, ["down_blocks.0"]),
        partial(draw, pag_scale=3.0),
        status=WARNS,
        mend=lambda pipe: None,
        note="PAG's attention runs on its layers, ours on the others",
        every_layer=False,
    ),
    Row("SAG", lambda: make_pipe(diffusers.StableDiffusionSAGPipeline), partial(draw, sag_scale=0.75)),
    Row(
        "DeepCache 0.1.1 enabled before the patch",
        make_ddim,
        partial(draw, steps=6),
        before=enable_deepcache,
        every_layer=False,
    ),
    Row(
        "DeepCache 0.1.1 enabled after the patch",
        make_ddim,
        partial(draw, steps=6),
        after=enable_deepcache,
        every_layer=False,
    ),
    Row(
        "SDCFGCutoffCallback (guidance cut off half-way)",
        make_pipeline,
        lambda pipe: draw(
            pipe,
            steps=6,
            callback_on_step_end=diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5),
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        ),
    ),
    Row("ToMeSD applied and removed before", make_pipeline, before=use_and_remove_tomesd),
]


@parametrize(GROUP, ROWS)
def test_adapter(row):
    check_row(row)


@pytest.mark.parametrize(
    "change, run",
    [
        (load_lora, draw),
        (in_turn(load_lora, call("fuse_lora")), draw),
        (load_ip_adapter, draw_with_image_prompt),
        (call("enable_freeu", s1=0.9, s2=0.2, b1=1.5, b2=1.6), draw),
    ],
)
def test_what_this_file_loads_does_something(change, run):
    pipe = make_pipeline()
    before = draw(pipe)
    change(pipe)
    assert not torch.equal(run(pipe), before)


def test_describe_names_what_replaced_the_patch():
    pipe = agentsd.apply_patch(make_pipeline())
    pipe.enable_attention_slicing()
    statuses = {layer.status for layer in agentsd.describe(pipe).layers}
    assert any("replaced by SlicedAttnProcessor" in status for status in statuses) and "active" not in statuses
    agentsd.apply_patch(pipe)
    assert "active" in {layer.status for layer in agentsd.describe(pipe).layers}


@compat(GROUP, "ToMeSD on the model", CLEAR_ERROR, "says to call tomesd.remove_patch first")
def test_tomesd_before_is_refused():
    pipe = make_pipeline()
    tomesd.apply_patch(pipe, ratio=0.5)
    with pytest.raises(ValueError, match="tomesd.remove_patch"):
        agentsd.apply_patch(pipe)
    assert get_patch(pipe) is None


@compat(GROUP, "ToMeSD applied after ours", WARNS, "both would merge; asks to use one of them")
def test_tomesd_afterwards_says_so():
    pipe = agentsd.apply_patch(make_pipeline())
    tomesd.apply_patch(pipe, ratio=0.5)
    with pytest.warns(UserWarning, match="use one of them"):
        draw(pipe)


class DoublingAttnProcessor(AttnProcessor2_0):
    """A processor of somebody's own, which ours may not stand in for."""

    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


@compat(GROUP, "An attention processor of one's own", WARNS, "its layers stay unpatched; the warning names them")
def test_a_processor_of_ones_own_keeps_its_layers():
    pipe = make_pipeline()
    pipe.unet.set_attn_processor(DoublingAttnProcessor())
    plain = draw(pipe)
    with pytest.warns(UserWarning, match="no layer .*test_compat_adapters.DoublingAttnProcessor is not .*attn1"):
        agentsd.apply_patch(pipe)
    assert torch.equal(draw(pipe), plain)

    some = make_pipeline()
    theirs = next(iter(some.unet.attn_processors))
    some.unet.set_attn_processor(
        {name: DoublingAttnProcessor() if name == theirs else AttnProcessor2_0() for name in some.unet.attn_processors}
    )
    with pytest.warns(UserWarning, match="left alone: .*test_compat_adapters.DoublingAttnProcessor is not one of"):
        agentsd.apply_patch(some)
    with record_attention(some) as record:
        draw(some)
    record.check()
    assert isinstance(some.unet.attn_processors[theirs], DoublingAttnProcessor)


def test_processors_saved_while_patched_and_put_back_later_do_no_harm():
    """PAG, SAG and unfuse_qkv_projections put back what they found, which may be ours although the patch is gone."""
    pipe = make_pipeline()
    plain = draw(pipe)
    agentsd.apply_patch(pipe)
    patched = draw(pipe)
    saved = copy.copy(pipe.unet.attn_processors)
    agentsd.remove_patch(pipe)
    pipe.unet.set_attn_processor(saved)
    assert torch.equal(draw(pipe), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        agentsd.apply_patch(pipe)
        assert torch.equal(draw(pipe), patched)
    agentsd.remove_patch(pipe)
    assert torch.equal(draw(pipe), plain)
