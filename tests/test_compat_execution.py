"""Compatibility matrix, execution: compiled, offloaded, other types and layouts, copied, saved, shared, threads."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import accelerate
import diffusers
import peft
import pytest
import torch
from compat_matrix import CLEAR_ERROR, Row, check_row, compat, parametrize, record_attention
from conftest import SD_BETAS, call_unet, draw, make_pipeline, make_unet
from diffusers import DDIMScheduler
from test_compat_adapters import call
from test_compat_pipelines import make_sdxl, picture

import agentsd
from agentsd import Phase
from agentsd.patch import get_patch

GROUP = "Execution"


def offload_models(pipe) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_sequentially(pipe) -> None:
    # What enable_sequential_cpu_offload does to each model; accelerate cannot do it to CLIP without an accelerator.
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    assert pipe.unet.conv_in.weight.device.type == "meta"


def offload_groups(pipe) -> None:
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def draw_unguided(pipe) -> torch.Tensor:
    return draw(pipe, guidance_scale=1.0)


def draw_inference_mode(pipe) -> torch.Tensor:
    with torch.inference_mode():
        return draw(pipe).clone()


def draw_by_embeddings(pipe) -> torch.Tensor:
    text = torch.randn(2, 1, 77, 32, generator=torch.Generator().manual_seed(1))
    return draw(pipe, prompt=None, prompt_embeds=text[0], negative_prompt_embeds=text[1])


ROWS = [
    Row("enable_model_cpu_offload before the patch", make_pipeline, before=offload_models),
    Row("enable_model_cpu_offload after the patch", make_pipeline, after=offload_models),
    Row("Sequential CPU offload before the patch", make_pipeline, before=offload_sequentially),
    Row("Sequential CPU offload after the patch", make_pipeline, after=offload_sequentially),
    Row("Group offload", make_pipeline, before=offload_groups),
    Row(
        "Layerwise casting (8-bit storage)",
        make_pipeline,
        before=lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    ),
    Row(
        "channels_last",
        make_pipeline,
        after=lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    ),
    Row("bfloat16", lambda: make_pipeline().to(torch.bfloat16)),
    Row("float16", lambda: make_pipeline("sd2").to(torch.float16)),
    Row("Moved to another dtype after the patch", make_pipeline, after=call("to", torch.bfloat16)),
    Row("torch.inference_mode", make_pipeline, draw_inference_mode),
    Row("Batch of 3 prompts", make_pipeline, partial(draw, prompt=["a zebra", "a boat", "the sea"])),
    Row("num_images_per_prompt", make_pipeline, partial(draw, num_images_per_prompt=2)),
    Row("Guidance off (a batch of one)", make_pipeline, draw_unguided),
    Row("Prompt embeddings in place of a prompt", make_pipeline, draw_by_embeddings),
    Row("Non-square pictures", make_pipeline, partial(draw, height=96, width=192)),
    Row("Odd latent sizes (19 × 13)", make_pipeline, partial(draw, height=152, width=104)),
    Row("Odd latent sizes on SDXL (19 × 13)", make_sdxl, partial(draw, height=152, width=104)),
    Row(
        "All levels patched, all parts merged",
        lambda: make_pipeline("sd15-deep"),
        settings=dict(max_downsample=8, merge_crossattn=True, merge_mlp=True, ratio=0.5),
    ),
]


@parametrize(GROUP, ROWS)
def test_execution(row):
    check_row(row)


# --- compiled ---------------------------------------------------------------------------------------------------------


def compiled_by(method: str):
    return pytest.param(method, marks=compat(GROUP, f"unet.{method}(fullgraph=True) with Inductor"))


@pytest.mark.parametrize("how", [compiled_by("compile"), compiled_by("compile_repeated_blocks")])
def test_compiled_by_inductor(how):
    """Equal to eager within 1e-4, with one graph per phase, then none however many steps follow."""
    small = dict(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    )
    pipe = make_pipeline(scheduler=DDIMScheduler(**SD_BETAS), **small)
    plain = draw(pipe, steps=3)
    agentsd.apply_patch(pipe)
    eager = draw(pipe, steps=3)
    assert (eager - plain).abs().max() > 1e-3

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    getattr(pipe.unet, how)(fullgraph=True)
    compiled = draw(pipe, steps=3)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (compiled - eager).abs().max() < 1e-4
    assert 0 < graphs <= 2  # every block of this UNet is alike, so one graph serves them all
    assert torch.equal(draw(pipe, steps=3), compiled)
    draw(pipe, steps=5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


# --- sizes and training -----------------------------------------------------------------------------------------------


@compat(GROUP, "Sizes that change between calls")
def test_sizes_change_between_calls():
    pipe = agentsd.apply_patch(make_pipeline())
    sizes = [(128, 128), (96, 192), (152, 104)]
    alone = {size: draw(agentsd.apply_patch(make_pipeline()), height=size[0], width=size[1]) for size in sizes}
    for size in (*sizes, *reversed(sizes)):
        with record_attention(pipe) as record:
            assert torch.equal(draw(pipe, height=size[0], width=size[1]), alone[size])
        record.check()


@compat(GROUP, "Gradient checkpointing")
def test_gradient_checkpointing():
    """The blocks run a second time in the backward pass, and must merge the same tokens then."""
    gradients = {}
    for checkpointing in (False, True):
        unet = make_unet("sd15-deep").train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        agentsd.apply_patch(unet, max_downsample=2, merge_mlp=True)
        for timestep in (900, 100):
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn(2, 4, 16, 16, generator=generator)
            text = torch.randn(2, 7, 32, generator=generator)
            with record_attention(unet) as record:
                unet(sample, timestep, text).sample.square().mean().backward()
            assert record.found.total() == record.expected.total() * (2 if checkpointing else 1)
        gradients[checkpointing] = {name: parameter.grad for name, parameter in unet.named_parameters()}
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, msg=name)


@pytest.mark.parametrize("timesteps", [(900, 850), (900, 100)], ids=["two-draws", "two-phases"])
def test_gradient_checkpointing_over_several_calls(timesteps):
    """Blocks of the first call run again after the second one, with other dsts or in another phase: not with those."""
    gradients = []
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 32, generator=generator)
    for checkpointing in (False, True):
        unet = make_unet("sd15-deep").train()
        agentsd.apply_patch(unet, max_downsample=2, merge_mlp=True)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        outputs = [unet(sample, timestep, text).sample for timestep in timesteps]
        with torch.no_grad():
            unet(sample, 500, text)
        sum(output.square().mean() for output in outputs).backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
        agentsd.remove_patch(unet)
        functions = [vars(module).get("_gradient_checkpointing_func") for module in unet.modules()]
        assert not any("agentsd" in type(function).__module__ for function in functions)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# --- copied, saved, shared --------------------------------------------------------------------------------------------


@compat(GROUP, "copy.deepcopy of a patched pipeline", note="the copy is patched by itself")
def test_deepcopy():
    pipe = make_pipeline()
    plain = draw(pipe)
    agentsd.apply_patch(pipe)
    patched = draw(pipe)
    twin = copy.deepcopy(pipe)
    agentsd.remove_patch(pipe)
    assert torch.equal(draw(pipe), plain)
    with record_attention(twin) as record:
        assert torch.equal(draw(twin), patched)
    record.check()
    agentsd.remove_patch(twin)
    assert torch.equal(draw(twin), plain)


@compat(GROUP, "save_pretrained of a patched pipeline", note="the folder loads unpatched")
def test_saved_folder_loads_unpatched(tmp_path):
    pipe = make_pipeline()
    plain = draw(pipe)
    agentsd.apply_patch(pipe)
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert get_patch(again) is None
    assert torch.equal(draw(again), plain)


@compat(GROUP, "Two pipelines that share one UNet", note="the patch is on the UNet, so on both")
def test_two_pipelines_share_one_unet():
    def draw_from_picture(pipe):
        return draw(pipe, steps=5, image=picture(), strength=0.9)

    one = make_pipeline(scheduler=DDIMScheduler(**SD_BETAS))
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(one)
    other.set_progress_bar_config(disable=True)
    plain, plain_other = draw(one), draw_from_picture(other)
    agentsd.apply_patch(one)
    patched, patched_other = draw(one), draw_from_picture(other)
    assert not torch.equal(patched_other, plain_other)
    agentsd.apply_patch(other)  # replaces, and does not merge twice
    with record_attention(one) as record:
        assert torch.equal(draw(one), patched) and torch.equal(draw_from_picture(other), patched_other)
    record.check()
    agentsd.remove_patch(one)
    assert get_patch(other) is None
    assert torch.equal(draw(one), plain) and torch.equal(draw_from_picture(other), plain_other)


# --- wrapped, sharded, quantised, sent to a worker --------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    """A distributed job of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrap_ddp(unet):
    return torch.nn.parallel.DistributedDataParallel(unet)


def wrap_fsdp(unet):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(unet, mesh=init_device_mesh("cpu", (1,)))


def wrap_peft(unet):
    return peft.get_peft_model(unet, peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))


def call_wrapped(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 32, generator=generator)
    with torch.no_grad():
        return model(sample, 900, text).sample


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(wrap, marks=compat(GROUP, name))
        for wrap, name in (
            (wrap_ddp, "DistributedDataParallel"),
            (torch.nn.DataParallel, "DataParallel"),
            (wrap_fsdp, "FSDP (fully_shard)"),
            (wrap_peft, "PeftModel (get_peft_model)"),
        )
    ],
)
def test_wrapped_and_sharded_models_are_patched_inside(wrap, process_group):
    expected = call_wrapped(agentsd.apply_patch(make_unet()))
    unet = make_unet()
    wrapped = wrap(unet)
    plain = call_wrapped(wrapped)
    assert agentsd.apply_patch(wrapped) is wrapped
    with record_attention(wrapped) as record:
        out = call_wrapped(wrapped)
    record.check({Phase.AGENT})
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    agentsd.remove_patch(wrapped)
    assert torch.equal(call_wrapped(wrapped), plain) and get_patch(unet) is None


def quantise_torchao(pipe) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    torchao.quantize_(pipe.unet, torchao.Int8WeightOnlyConfig())


def quantise_quanto(pipe) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto")
    quanto.quantize(pipe.unet, weights=quanto.qint8)
    quanto.freeze(pipe.unet)


@parametrize(
    GROUP,
    [
        Row("Quantised by torchao (int8 weights)", make_pipeline, before=quantise_torchao),
        Row("Quantised by optimum-quanto (int8 weights)", make_pipeline, before=quantise_quanto),
    ],
)
def test_quantised(row):
    check_row(row)


@compat(GROUP, "Pickled to a spawned worker", note="the copy in the worker is patched by itself")
def test_pickled_to_a_spawned_worker():
    unet = agentsd.apply_patch(make_unet())
    expected = call_unet(unet)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert torch.equal(pool.submit(call_unet, unet).result(), expected)
    again = pickle.loads(pickle.dumps(unet))
    agentsd.remove_patch(again)
    assert get_patch(unet) is not None and not torch.equal(call_unet(again), expected)


# --- threads ----------------------------------------------------------------------------------------------------------


@compat(GROUP, "Threads, each with its own pipeline")
def test_threads_on_two_pipelines():
    settings = [dict(ratio=0.5, early=0.8), dict(ratio=0.2, seed=3)]
    pipes = [agentsd.apply_patch(make_pipeline(), **setting) for setting in settings]
    alone = [draw(pipe, steps=6) for pipe in pipes]
    start = threading.Barrier(len(pipes))

    def run(pipe):
        start.wait()
        return [draw(pipe, steps=6) for _ in range(3)]

    with ThreadPoolExecutor(len(pipes)) as pool:
        for right, pictures in zip(alone, pool.map(run, pipes)):
            assert all(torch.equal(picture, right) for picture in pictures)


@compat(GROUP, "Threads that call one UNet at once", CLEAR_ERROR, "asks for a copy per thread, or a lock")
def test_threads_on_one_unet_are_refused():
    unet = make_unet()
    agentsd.apply_patch(unet)
    expected = call_unet(unet)
    inside, go_on = threading.Event(), threading.Event()

    def wait_inside(*_):
        if not inside.is_set():
            inside.set()
            assert go_on.wait(60)

    handle = unet.mid_block.register_forward_hook(wait_inside)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(call_unet, unet)
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="two threads.*copy"):
            call_unet(unet, timestep=100)
        go_on.set()
        assert torch.equal(first.result(), expected)  # the call that was there first is not disturbed
    handle.remove()
    assert torch.equal(call_unet(unet), expected)  # and one after the other, from any thread, is fine

    def fail(*_):
        raise KeyError("a failing layer")

    handle = unet.conv_out.register_forward_pre_hook(fail)
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError, match="failing"):
        pool.submit(call_unet, unet).result()
    handle.remove()
    assert torch.equal(call_unet(unet), expected)  # a call that fails lets go of the UNet
