"""The parts around the transformer: every loader on the toy's files, errors of files that do not fit, sane outputs.

tests/parity compares what they compute with the reference.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.engine import codec, components
from ltx_ray.engine.base import Rank
from ltx_ray.engine.text import TextEngine
from ltx_ray.records import ImageCondition, ModelError, WorkItem
from ltx_ray.stages import Stage
from ltx_ray.storage.images import image_digest
from ltx_ray.toy import ToyShape, make_toy_model
from tests.support.samples import SMALL, recipe, request

pytestmark = pytest.mark.slow  # Every test builds modules of diffusers.

CPU = "cpu"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def path(toy):
    return toy["checkpoint_path"]


@pytest.fixture(scope="module")
def bfloat16_vocoder(path):
    return components.load_vocoder(path, torch.bfloat16, CPU)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def changed(path, tmp_path, edit=None, edit_config=None):
    """A copy of the file with edited tensors or an edited config."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())  # noqa: SIM118
    if edit:
        edit(tensors)
    if edit_config:
        config = json.loads(metadata["config"])
        edit_config(config)
        metadata["config"] = json.dumps(config)
    copy = str(tmp_path / "changed.safetensors")
    save_file(tensors, copy, metadata=metadata)
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_connectors(path, dtype):
    connectors = components.load_connectors(path, dtype, CPU)
    assert {p.dtype for p in connectors.parameters()} == {dtype}
    shape = ToyShape()
    hidden = tuple(normal(2, 256, shape.gemma_hidden, seed=i) for i in range(shape.gemma_layers + 1))
    mask = torch.ones(2, 256, dtype=torch.int64)
    mask[0, :200] = 0  # Padding on the left.
    video, audio = codec.encode_connectors(connectors, hidden, mask)
    assert video.shape == (2, 256, shape.dim) and audio.shape == (2, 256, shape.audio_dim)
    assert video.dtype == audio.dtype == dtype
    assert torch.isfinite(video).all() and torch.isfinite(audio).all()


def test_connectors_ignore_padding(path):
    connectors = components.load_connectors(path, torch.float32, CPU)
    shape = ToyShape()
    hidden = tuple(normal(1, 128, shape.gemma_hidden, seed=i) for i in range(shape.gemma_layers + 1))
    mask = torch.zeros(1, 128, dtype=torch.int64)
    mask[0, 100:] = 1
    garbled = tuple(torch.where(mask[..., None].bool(), h, 100.0) for h in hidden)
    for a, b in zip(
        codec.encode_connectors(connectors, hidden, mask), codec.encode_connectors(connectors, garbled, mask)
    ):
        assert torch.equal(a, b)


def test_video_decode_shows_something(path):
    vae = components.load_video_vae(path, torch.float32, CPU)
    assert vae.encoder is None
    pixels = codec.decode_video_tile(vae, normal(1, 128, 3, 4, 6))
    assert pixels.shape == (1, 3, 17, 128, 192) and torch.isfinite(pixels).all()
    assert pixels.std(dim=(1, 3, 4)).min() > 0.15, "every frame has contrast"
    assert (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean(dim=(1, 3, 4)).min() > 0.003, "neighbours differ"
    assert (pixels.abs() > 1).float().mean() < 0.25
    assert (pixels - pixels.mean(1, keepdim=True)).std() > 0.05, "it has colours"


def test_video_halves_are_the_whole(path):
    both = components.load_video_vae(path, torch.float32, CPU, "both")
    half = components.load_video_vae(path, torch.float32, CPU, "encoder")
    assert half.decoder is None
    pixels = normal(1, 3, 9, 64, 64).clamp(-1, 1)
    latents = codec.encode_video(half, pixels)
    assert latents.shape == (1, 128, 2, 2, 2) and torch.isfinite(latents).all() and 0.2 < latents.std() < 3
    assert torch.equal(latents, codec.encode_video(both, pixels))
    with pytest.raises(ValueError, match="part is 'all'; legal is"):
        components.load_video_vae(path, torch.float32, CPU, "all")


def test_only_the_tensors_of_the_part_are_read(path, monkeypatch):
    read = []

    class Spy:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.file.keys()

        def metadata(self):
            return self.file.metadata()

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    opened = components._open
    monkeypatch.setattr(components, "_open", lambda p: Spy(opened(p)))
    components.load_video_vae(path, torch.float32, CPU)
    assert read and all(k.startswith(("vae.decoder.", "vae.per_channel_statistics.")) for k in read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_audio(path, dtype, bfloat16_vocoder):
    vae = components.load_audio_decoder(path, dtype, CPU)
    vocoder = bfloat16_vocoder if dtype == torch.bfloat16 else components.load_vocoder(path, dtype, CPU)
    assert {p.dtype for p in vae.parameters()} == {dtype}
    assert {t.dtype for t in [*vocoder.parameters(), *vocoder.buffers()]} == {torch.float32}
    latents = normal(1, 8, 18, 16).to(dtype)
    mel = codec.decode_mel(vae, latents)
    assert mel.shape == (1, 2, 4 * 18 - 3, 64) and mel.dtype == dtype
    waveform, rate = codec.decode_audio(vae, vocoder, latents)
    assert rate == 48000 and waveform.dtype == torch.float32 and waveform.shape == (2, (4 * 18 - 3) * 160 * 3)
    assert torch.isfinite(waveform).all()
    assert 0.1 < waveform.abs().max() <= 1 and waveform.std() > 0.02 and waveform.mean().abs() < 0.05


def test_vocoder_resampler_keeps_a_constant(bfloat16_vocoder):
    # The filter has been computed, and its taps for each phase sum to 1.
    out = bfloat16_vocoder.resampler(torch.ones(1, 1, 400))
    assert out.shape == (1, 1, 1200) and (out[..., 60:-60] - 1).abs().max() < 0.01


def test_upsampler(toy, path):
    upsampler = components.load_upsampler(toy["spatial_upsampler_path"], torch.bfloat16, CPU)
    mean, std = components.latent_stats(path)
    out = codec.upsample_latents(upsampler, mean, std, normal(1, 128, 3, 2, 3).bfloat16())
    assert out.shape == (1, 128, 3, 4, 6) and out.dtype == torch.bfloat16
    assert torch.isfinite(out).all() and 0.2 < out.std() < 3


def test_upsampler_of_a_single_token(tmp_path, toy):
    """A clip of 64x64 and one frame. With as many channels as groups, norms see single values, which they make 0."""
    latent = normal(1, 128, 1, 1, 1)
    wide = make_toy_model(tmp_path, shape=ToyShape(layers=1, upsampler_channels=64))["spatial_upsampler_path"]
    for path in (toy["spatial_upsampler_path"], wide):
        upsampler = components.load_upsampler(path, torch.float32, CPU)
        assert upsampler(latent).isfinite().all() and upsampler(latent).shape == (1, 128, 1, 2, 2)
    norm = components.load_upsampler(toy["spatial_upsampler_path"], torch.float32, CPU).initial_norm
    found = norm(normal(1, 32, 1, 1, 1)).flatten()
    assert torch.allclose(found, norm.bias, atol=1e-4) and not torch.equal(norm.bias, torch.zeros(32))
    x = normal(1, 32, 2, 3, 4)
    assert torch.equal(norm(x), torch.nn.functional.group_norm(x, 32, norm.weight, norm.bias, norm.eps))


def reflecting(config):
    config["vae"]["spatial_padding_mode"] = "reflect"


def test_a_vae_that_reflects_takes_a_side_of_one_latent(path, tmp_path):
    """So small are previews and conditioning images of clips with a side of 64 pixels, and there PyTorch reflects
    nothing."""
    copy = changed(path, tmp_path, edit_config=reflecting)
    vae = components.load_video_vae(copy, torch.float32, CPU, "both")
    fused = components.load_video_vae(copy, torch.float32, CPU, fused=True)
    for height, width in ((1, 1), (1, 3), (2, 1)):
        pixels = codec.decode_video_tile(vae, normal(1, 128, 2, height, width))
        assert pixels.shape == (1, 3, 9, 32 * height, 32 * width) and pixels.isfinite().all() and pixels.std() > 0
        again = codec.decode_video_tile(fused, normal(1, 128, 2, height, width))
        assert torch.allclose(again, pixels, atol=1e-4)
        latent = codec.encode_video(vae, normal(1, 3, 1, 32 * height, 32 * width).clamp(-1, 1))
        assert latent.shape == (1, 128, 1, height, width) and latent.isfinite().all()


def test_a_vae_that_reflects_is_the_library_s_elsewhere(path, tmp_path):
    vae = components.load_video_vae(changed(path, tmp_path, edit_config=reflecting), torch.float32, CPU)
    conv = vae.decoder.conv_in.conv
    library = torch.nn.Conv3d(128, conv.out_channels, 3, padding=(0, 1, 1), padding_mode="reflect")
    library.load_state_dict(conv.state_dict())
    assert torch.equal(conv(normal(1, 128, 3, 2, 3)), library(normal(1, 128, 3, 2, 3)))
    # A single row is like a picture of equal rows, whose reflection is such a row.
    row = normal(1, 128, 3, 1, 3)
    assert torch.allclose(conv(row), library(row.expand(-1, -1, -1, 3, -1))[:, :, :, 1:2], atol=1e-5)


def test_statistics(path):
    for which in ("video", "audio"):
        mean, std = components.latent_stats(path, which)
        assert mean.shape == std.shape == (128,) and (std > 0).all()
    with pytest.raises(ValueError, match="which is 'text'; legal is"):
        components.latent_stats(path, "text")


LOADERS = {
    "vae.decoder.": components.load_video_vae,
    "audio_vae.decoder.": components.load_audio_decoder,
    "vocoder.vocoder.": components.load_vocoder,
    "model.diffusion_model.video_embeddings_connector.": components.load_connectors,
}


@pytest.mark.parametrize("prefix", LOADERS)
def test_missing_keys_are_named(path, tmp_path, prefix):
    def cut(tensors):
        for key in [k for k in tensors if k.startswith(prefix)][:12]:
            del tensors[key]

    with pytest.raises(ValueError, match=r"changed\.safetensors: .*12 missing keys: .*, …") as error:
        LOADERS[prefix](changed(path, tmp_path, cut), torch.float32, CPU)
    assert str(error.value).count(", ") == 10, "ten keys and the ellipsis"


@pytest.mark.parametrize("prefix", LOADERS)
def test_unexpected_keys_are_named(path, tmp_path, prefix):
    copy = changed(path, tmp_path, lambda t: t.update({f"{prefix}surprise": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"1 unexpected keys: .*surprise"):
        LOADERS[prefix](copy, torch.float32, CPU)


def test_wrong_shapes_are_named(path, tmp_path):
    copy = changed(path, tmp_path, lambda t: t.update({"vae.decoder.conv_in.conv.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.conv\.bias \(3,\) instead of \(64,\)"):
        components.load_video_vae(copy, torch.float32, CPU)


def test_extra_statistics_of_older_files_are_ignored(path, tmp_path):
    extra = {
        f"{vae}.per_channel_statistics.{name}": torch.zeros(128)
        for vae in ("vae", "audio_vae")
        for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
    }
    copy = changed(path, tmp_path, lambda t: t.update(extra))
    components.load_video_vae(copy, torch.float32, CPU, "both")
    components.load_audio_decoder(copy, torch.float32, CPU)


def test_metadata_that_cannot_be_followed_is_refused(path, tmp_path):
    cases = {
        "caption_proj_before_connector": lambda c: c["transformer"].update(caption_proj_before_connector=False),
        "config.vae.timestep_conditioning": lambda c: c["vae"].update(timestep_conditioning=True),
        "config.vae.norm_layer is 'group_norm'": lambda c: c["vae"].update(norm_layer="group_norm"),
        "config.vae.decoder_blocks is": lambda c: c["vae"]["decoder_blocks"].insert(0, ["attn", {}]),
        "no config.vocoder.bwe": lambda c: c["vocoder"].pop("bwe"),
    }
    loaders = {
        "caption": components.load_connectors,
        "config": components.load_video_vae,
        "no": components.load_vocoder,
    }
    for words, edit in cases.items():
        load = loaders[words.replace(".", " ").replace("_", " ").split()[0]]
        with pytest.raises(ValueError) as error:
            load(changed(path, tmp_path, edit_config=edit), torch.float32, CPU)
        assert words.removeprefix("no ") in str(error.value) and "changed.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "part, edit, load",
    [
        ("connectors", lambda c: c["transformer"].pop("caption_channels"), components.load_connectors),
        ("connectors", lambda c: c["transformer"].update(caption_channels=0), components.load_connectors),
        ("video_vae", lambda c: c["vae"].pop("encoder_blocks"), components.load_video_vae),
        ("video_vae", lambda c: c["vae"].update(decoder_blocks=[5]), components.load_video_vae),
        ("audio_vae", lambda c: c["audio_vae"].update(preprocessing=[]), components.load_audio_decoder),
        ("vocoder", lambda c: c["vocoder"]["bwe"].pop("n_fft"), components.load_vocoder),
    ],
)  # fmt: skip
def test_metadata_without_a_field_name_the_file_and_the_part(path, tmp_path, part, edit, load):
    with pytest.raises(ValueError, match=rf"changed\.safetensors: the metadata do not describe the part {part} "):
        load(changed(path, tmp_path, edit_config=edit), torch.float32, CPU)


@pytest.mark.parametrize(
    "words, edit, load",
    [
        ("video VAE (decoder): latent_channels is 64; legal: 128", lambda c: c["vae"].update(latent_channels=64),
         components.load_video_vae),
        ("video VAE (decoder): spatial_compression_ratio is 16; legal: 32", lambda c: c["vae"].update(patch_size=2),
         components.load_video_vae),
        ("audio VAE (decoder): sample_rate is 24000; legal: 16000",
         lambda c: c["audio_vae"]["model"]["params"].update(sampling_rate=24000), components.load_audio_decoder),
        ("vocoder: output_sampling_rate is 44100; legal: 48000",
         lambda c: c["vocoder"]["bwe"].update(output_sampling_rate=44100), components.load_vocoder),
    ],
)  # fmt: skip
def test_parts_for_clips_of_another_size_are_refused(path, tmp_path, words, edit, load):
    """Each would fail every clip after the work, or cut its sound."""
    with pytest.raises(ValueError, match=re.escape(words)):
        load(changed(path, tmp_path, edit_config=edit), torch.float32, CPU)


def test_a_video_encoder_that_does_not_fit_blames_no_row(toy, path, tmp_path):
    """It is loaded for the first image, long after the other parts of the model."""
    copy = changed(path, tmp_path, lambda tensors: tensors.pop("vae.encoder.conv_in.conv.bias"))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    image = ImageCondition(str(tmp_path / "a.png"), 0, 1.0, None)
    asked = replace(request(**SMALL), images=(image,))
    item = WorkItem("x", asked, recipe(), "", (image_digest(image.path),))
    spec = EngineSpec("", replace(ModelFiles(**toy), checkpoint_path=copy), Numerics(device="cpu"), "")
    with pytest.raises(ModelError, match=r"changed\.safetensors: video VAE \(encoder\): 1 missing keys"):
        TextEngine(spec, Rank()).run(Stage.TEXT, item)


def test_a_file_without_config(toy, tmp_path):
    copy = str(tmp_path / "bare.safetensors")
    save_file({"x": torch.zeros(1)}, copy)
    with pytest.raises(ValueError, match=r"bare\.safetensors: no `config`"):
        components.load_video_vae(copy, torch.float32, CPU)


def test_other_widths(tmp_path):
    shape = ToyShape(
        layers=1, connector_layers=1, gemma_hidden=32, gemma_layers=2, encoder_layers=(1, 1, 2, 1, 1),
        encoder_multipliers=(1, 1, 1, 2), decoder_layers=(1, 1, 1, 1, 3), decoder_base=4, audio_mult=(1, 1, 2),
        vocoder_channels=64, bwe_channels=32, upsampler_blocks=2,
    )  # fmt: skip
    made = make_toy_model(tmp_path, shape=shape)
    path = made["checkpoint_path"]
    both = components.load_video_vae(path, torch.bfloat16, CPU, "both")
    assert codec.encode_video(both, torch.zeros(1, 3, 1, 32, 32)).shape == (1, 128, 1, 1, 1)
    components.load_audio_decoder(path, torch.bfloat16, CPU)
    components.load_vocoder(path, torch.bfloat16, CPU)
    components.load_connectors(path, torch.bfloat16, CPU)
    components.load_upsampler(made["spatial_upsampler_path"], torch.bfloat16, CPU)
