"""The opset-24 decoder against Hugging Face: same logits at odd lengths, same tokens over two turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from export.decoder_graph import OPSET, DecoderSizes, write_decoder
from ppcr.errors import CheckpointError
from ppcr.model.checkpoint import save_mllm
from ppcr.tensors import TensorFiles

MAX_LENGTH = 96
IMAGE, START, END = 3, 1, 2
GRID = (4, 6)  # patches; 2 x 3 image tokens


def tiny_model(*, tied: bool, heads: int, kv_heads: int) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(7)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": 96,
            "vocab_size": 128,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": mrope(heads)},
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
            "use_sliding_window": False,
            "bos_token_id": 0,
            "eos_token_id": 5,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "patch_size": 4,
            "window_size": 64,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=4,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        # Larger than by default: the layers, not the token just read, decide what comes next.
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15.0)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def mrope(heads: int) -> list[int]:
    pairs = 64 // heads // 2
    return [pairs // 2, pairs // 4, pairs // 4]


@dataclass
class Host:
    """A conversation on the exported graph: one cache, blocks of any length."""

    session: ort.InferenceSession
    model: Qwen2_5_VLForConditionalGeneration
    sizes: DecoderSizes

    def __post_init__(self) -> None:
        s = self.sizes
        shape = (1, s.kv_heads, MAX_LENGTH, s.head_dim)
        # Not zero: what lies behind the mask must not matter.
        names = [f"{cache}_cache_{i}" for i in range(s.layers) for cache in "kv"]
        self.caches = {name: np.full(shape, 3.0, np.float32) for name in names}
        self.length = 0

    def extend(self, embeddings: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """embeddings f32 [S, hidden], positions [3, S] -> logits [vocabulary] of the last token."""
        s, block = self.sizes, len(embeddings)
        inverse = s.rope_theta ** (-np.arange(0, s.head_dim, 2) / s.head_dim)
        axis = np.repeat([0, 1, 2], s.mrope_section)
        angles = (positions[axis].T * inverse)[None].astype(np.float32)
        mask = np.arange(MAX_LENGTH) <= self.length + np.arange(block)[:, None]
        feeds = {
            "inputs_embeds": embeddings[None],
            "rope_cos": np.cos(angles),
            "rope_sin": np.sin(angles),
            "write_indices": np.array([self.length]),
            "attn_mask": mask[None, None],
            "logits_index": np.array([block - 1]),
            **self.caches,
        }
        names = ["logits", *(name.replace("cache_", "cache_out_") for name in self.caches)]
        logits, *caches = self.session.run(names, feeds)
        self.caches = dict(zip(self.caches, caches, strict=True))
        self.length += block
        return logits[0, 0]


@pytest.fixture(scope="module", params=["tied-gqa", "untied-mha"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    tied = request.param == "tied-gqa"
    model = tiny_model(tied=tied, heads=4 if tied else 2, kv_heads=2)
    folder = tmp_path_factory.mktemp(request.param)
    if tied:
        save_mllm(model, folder)
    else:
        model.save_pretrained(folder)
    config = Qwen2_5_VLConfig.from_pretrained(folder).to_dict()
    sizes = write_decoder(config, TensorFiles(folder), folder / "decoder.onnx", max_length=MAX_LENGTH)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # this host copies the caches, which onnxruntime remarks on each time
    session = ort.InferenceSession(folder / "decoder.onnx", options, providers=["CPUExecutionProvider"])
    return Host(session, model, sizes)


def conversation(length: int) -> tuple[list[int], torch.Tensor, dict[str, Any]]:
    """Token ids with an image, random patches, and what the stock model needs besides."""
    rng = np.random.default_rng(length)
    text = rng.integers(8, 128, size=length).tolist()
    patches = torch.from_numpy(rng.standard_normal((GRID[0] * GRID[1], 3 * 2 * 4 * 4)).astype(np.float32))
    image = [START] + [IMAGE] * 6 + [END]
    return text[:3] + image + text[3:], patches, {"image_grid_thw": torch.tensor([[1, *GRID]])}


def kinds(ids: list[int]) -> torch.Tensor:
    return (torch.tensor([ids]) == IMAGE).long()


def embeddings_and_positions(
    host: Host, ids: list[int], patches: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, int]:
    grid = torch.tensor([[1, *GRID]])
    with torch.no_grad():
        table = host.model.get_input_embeddings().weight.numpy()
        features = host.model.model.visual(patches, grid_thw=grid).pooler_output.numpy()
        positions, delta = host.model.model.get_rope_index(
            torch.tensor([ids]), mm_token_type_ids=kinds(ids), image_grid_thw=grid
        )
    embeddings = table[ids].copy()
    embeddings[np.array(ids) == IMAGE] = features
    return embeddings, positions[:, 0].numpy(), int(delta)


def fresh(host: Host) -> Host:
    return Host(host.session, host.model, host.sizes)


@pytest.mark.parametrize("length", [3, 4, 11, 37])
def test_logits_equal_hugging_face(host: Host, length: int) -> None:
    ids, patches, extra = conversation(length)
    embeddings, positions, _ = embeddings_and_positions(host, ids, patches)
    with torch.no_grad():
        full = (
            host.model(
                input_ids=torch.tensor([ids]), pixel_values=patches, mm_token_type_ids=kinds(ids), **extra
            )
            .logits[0]
            .numpy()
        )
    whole = fresh(host).extend(embeddings, positions)
    np.testing.assert_allclose(whole, full[-1], atol=2e-5, rtol=1e-4)
    # In blocks of odd sizes, on the cache, each block's last token agrees as well.
    pieces, start = fresh(host), 0
    for end in [*range(5, len(ids), 7), len(ids)]:
        logits = pieces.extend(embeddings[start:end], positions[:, start:end])
        np.testing.assert_allclose(logits, full[end - 1], atol=2e-5, rtol=1e-4)
        start = end


def test_two_turns_on_one_cache_equal_generate(host: Host) -> None:
    ids, patches, extra = conversation(9)
    table = host.model.get_input_embeddings().weight.detach().numpy()
    embeddings, positions, delta = embeddings_and_positions(host, ids, patches)
    talk = fresh(host)

    def answer(logits: np.ndarray, count: int) -> list[int]:
        out = [int(logits.argmax())]
        while len(out) < count:
            place = np.full((3, 1), talk.length + delta)
            out.append(int(talk.extend(table[out[-1:]], place).argmax()))
        return out

    def generate(prompt: list[int], count: int) -> list[int]:
        with torch.no_grad():
            full = host.model.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                pixel_values=patches, mm_token_type_ids=kinds(prompt), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **extra,
            )  # fmt: skip
        return full[0, len(prompt) :].tolist()

    first = answer(talk.extend(embeddings, positions), 12)
    assert first == generate(ids, 12)
    request = [17, 90, 33, 60, 21]
    block = [first[-1], *request]  # the last answer token has not been fed yet
    places = np.tile(np.arange(talk.length, talk.length + len(block)) + delta, (3, 1))
    second = answer(talk.extend(table[block], places), 9)
    assert second == generate(ids + first + request, 9)
    assert len(set(first + second)) > 4  # a model stuck on one token would prove nothing


def test_graph_is_standard_operators_only(host: Host, tmp_path: Path) -> None:
    host.model.save_pretrained(tmp_path)
    config = Qwen2_5_VLConfig.from_pretrained(tmp_path).to_dict()
    write_decoder(config, TensorFiles(tmp_path), tmp_path / "half.onnx", max_length=32, dtype=np.float16)
    model = onnx.load(tmp_path / "half.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    kinds_used = {node.op_type for node in model.graph.node}
    assert {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"} <= kinds_used
    types = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    assert types["inputs_embeds"] == onnx.TensorProto.FLOAT16
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_configs_of_both_transformers_series_give_the_same_sizes(host: Host) -> None:
    config = host.model.config.to_dict()
    flat = {**config, **config["text_config"], "model_type": "qwen2_5_vl"}
    del flat["text_config"]
    rope = flat.pop("rope_parameters")
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat["rope_theta"] = rope["rope_theta"]
    assert DecoderSizes.from_config(flat) == DecoderSizes.from_config(config) == host.sizes


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model_type": "llama"}, "llama"), ({"text_config": {"hidden_size": 64}}, "does not describe")],
)
def test_other_configurations_are_refused(host: Host, change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        DecoderSizes.from_config({**host.model.config.to_dict(), **change})


def test_missing_tensor_is_named(host: Host, tmp_path: Path) -> None:
    host.model.save_pretrained(tmp_path)
    config = host.model.config.to_dict()
    config["text_config"]["num_hidden_layers"] = 3
    with pytest.raises(CheckpointError, match=r"layers\.2\."):
        write_decoder(config, TensorFiles(tmp_path), tmp_path / "decoder.onnx", max_length=32)
