"""The toy's text encoder: a Gemma 3 directory with a tokenizer for any language, configurations and weights."""

from __future__ import annotations

from collections import Counter

from ltx_ray.toy import gemma_format
from ltx_ray.toy.config import ToyShape
from ltx_ray.toy.gemma_format import GemmaSizes
from ltx_ray.toy.weights import Draw

_CORPUS = """a woman walks slowly through the old market while the camera follows her from behind in soft morning
light the camera pans across a wide mountain valley with clouds moving over the snow a man in a red coat is speaking
to the crowd and the sound of rain is heard in the background close up of hands playing a piano in a dark room with
warm light two children are running along the beach at sunset with waves and seagulls a small dog is sleeping on the
wooden floor near the window a city street at night with neon signs and cars passing quickly an aerial view of the
river and the forest in autumn with birds singing a cook is cutting vegetables in a bright kitchen and talking the
train is leaving the station as people are waving blurry out of focus low quality distorted motion static noise music
voice whisper laughing singing dancing falling flying water fire smoke wind sky ground blue green yellow white black"""


def _sizes(s: ToyShape) -> GemmaSizes:
    return GemmaSizes(s.gemma_hidden, s.gemma_layers, s.gemma_heads, s.gemma_kv_heads)


def files(s: ToyShape) -> dict[str, dict]:
    """The JSON files of the Gemma directory by name."""
    words = Counter("▁" + word for word in _CORPUS.split())
    return gemma_format.files(_sizes(s), gemma_format.byte_pair_merges(words, gemma_format.VOCABULARY))


def draw_weights(draw: Draw, s: ToyShape) -> None:
    """Draw the text model, and a vision tower just large enough for the class to load."""
    gemma_format.draw_embeddings(draw, _sizes(s))
    gemma_format.draw_layers(draw, _sizes(s))
    gemma_format.draw_vision(draw, _sizes(s))
