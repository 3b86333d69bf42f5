"""Renders jobs with the reference from PyPI (ltx-pipelines 1.0.0), in float32 on the CPU: pypi_runner.py JOBS.json

test_pypi_reference.py starts it in the environment of `scripts/setup --parity`, without ltx_ray. A job is {files, row,
out}: a toy model's files, a manifest row that leaves nothing to defaults, and the safetensors file for the four final
latents. Prints the versions of its packages as JSON.

The reference computes in bfloat16. To run in float32, its modules see a torch whose bfloat16 is float32, and weights
are upcast as they are read, so that its own code merges LoRAs in float32 too.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

PACKAGES = ("ltx-core", "ltx-pipelines", "transformers", "torch")


def stub(name: str) -> None:
    """Register an empty module: torchaudio has no CPU build, and scipy is large."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # Other packages look at it before they import the module.
    sys.modules[name] = module


class Float32Torch(ModuleType):
    """torch as a module sees it that is to run in float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str):
        return getattr(torch, name)


def prepare():
    """Import the pipeline's module and make it run in float32 without CUDA."""
    for name in ("torchaudio", "scipy"):
        stub(name)
    import ltx_pipelines.ti2vid_two_stages_hq as pipeline
    from ltx_core.loader import fuse_loras, sft_loader
    from ltx_core.text_encoders.gemma.encoders import base_encoder
    from ltx_pipelines.utils import helpers

    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda *_: None
    pipeline.torch = fuse_loras.torch = Float32Torch("torch")
    pipeline.res2s_audio_video_denoising_loop = partial(
        pipeline.res2s_audio_video_denoising_loop, model_dtype=torch.float32
    )

    load = sft_loader.SafetensorsStateDictLoader.load

    def load_float32(self, *args, **kwargs):
        loaded = load(self, *args, **kwargs)
        loaded.sd.update({key: tensor.float() for key, tensor in loaded.sd.items()})
        return loaded

    sft_loader.SafetensorsStateDictLoader.load = load_float32

    # It looks for the sentencepiece file only to find the folder, and the toy has a tokenizer.json instead.
    find = base_encoder.find_matching_file
    base_encoder.find_matching_file = lambda root, pattern: find(
        root, "tokenizer.json" if pattern == "tokenizer.model" else pattern
    )
    # Neither prompt enhancement (the toy's tokenizer has no image token) nor sound (building a vocoder takes a second)
    # is compared. Garbage collection, which is for the GPU, takes as long.
    base_encoder.Gemma3Processor = lambda **_: None
    pipeline.ModelLedger.vocoder = pipeline.vae_decode_audio = lambda *_: None
    pipeline.cleanup_memory = helpers.cleanup_memory = lambda: None
    return pipeline


def use_gemma_config(gemma_root: str) -> None:
    """Give the reference, which has the 12B model's config built in, that of the directory."""
    from ltx_core.text_encoders.gemma.encoders import encoder_configurator
    from transformers import Gemma3Config

    encoder_configurator.GEMMA3_CONFIG_FOR_LTX = Gemma3Config.from_pretrained(gemma_root)


def guider(row: dict, stream: str):
    from ltx_core.components.guiders import MultiModalGuiderParams

    names = ("cfg_scale", "stg_scale", "stg_blocks", "rescale_scale", "modality_scale", "skip_step")
    return MultiModalGuiderParams(**{name: row[f"{stream}_{name}"] for name in names})


def render(pipeline, files: dict, row: dict) -> dict[str, torch.Tensor]:
    """`stage_1.video` ... `stage_2.audio`, unpacked."""
    from ltx_core.loader import LTXV_LORA_COMFY_RENAMING_MAP, LoraPathStrengthAndSDOps

    use_gemma_config(files["gemma_root"])
    latents: dict[str, torch.Tensor] = {}
    denoise = pipeline.denoise_audio_video

    def captured(*args, **kwargs):
        states = denoise(*args, **kwargs)
        stage = 1 + len(latents) // 2
        for name, state in zip(("video", "audio"), states, strict=True):
            latents[f"stage_{stage}.{name}"] = state.latent.clone().contiguous()
        return states

    def lora(path: str, strength: float):
        return LoraPathStrengthAndSDOps(path, strength, LTXV_LORA_COMFY_RENAMING_MAP)

    pipeline.denoise_audio_video = captured
    try:
        pipeline.TI2VidTwoStagesHQPipeline(
            checkpoint_path=files["checkpoint_path"],
            distilled_lora=[lora(files["distilled_lora"], 1.0)],
            distilled_lora_strength_stage_1=row["distilled_lora_strength_stage_1"],
            distilled_lora_strength_stage_2=row["distilled_lora_strength_stage_2"],
            spatial_upsampler_path=files["spatial_upsampler_path"],
            gemma_root=files["gemma_root"],
            loras=tuple(lora(files["loras"][use["name"]], use["strength"]) for use in row["loras"]),
            device=torch.device("cpu"),
        )(
            video_guider_params=guider(row, "video"),
            audio_guider_params=guider(row, "audio"),
            images=[],
            **{name: row[name] for name in ("prompt", "negative_prompt", "seed", "height", "width", "num_frames",
                                            "frame_rate", "num_inference_steps")},
        )  # fmt: skip
    finally:
        pipeline.denoise_audio_video = denoise
    return latents


def main() -> None:
    pipeline = prepare()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        save_file(render(pipeline, job["files"], job["row"]), job["out"])
    print(json.dumps({package: version(package) for package in PACKAGES}))


if __name__ == "__main__":
    main()
