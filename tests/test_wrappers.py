"""Models that look like those of nnsight and TransformerLens are told by what they have.

The libraries themselves are driven in test_nnsight.py and test_transformer_lens.py, where they are installed. The model
here takes its arguments as a `HookedTransformer` does, which TransformerLens has no more since version 4.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError
from strapfmt_capture.wrappers import is_lens, unwrapped

IDS = torch.tensor([[5, 6, 7], [9, 8, 7]])


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.hook_resid_post = torch.nn.Linear(8, 8), torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hook_resid_post(x + self.linear(x))


class Hooked(torch.nn.Module):
    def __init__(self, padding_side: str | None = None) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(d_vocab=11)
        self.tokenizer = None if padding_side is None else SimpleNamespace(padding_side=padding_side)
        self.embed, self.hook_embed = torch.nn.Embedding(11, 8), torch.nn.Identity()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.hook_dict = {"hook_embed": self.hook_embed}

    def forward(
        self, input: Any, attention_mask: torch.Tensor | None = None, past_kv_cache: Any = None
    ) -> torch.Tensor:
        x = self.hook_embed(self.embed(input)) if not input.is_floating_point() else input
        for block in self.blocks:
            x = block(x)
        return x


def tokens(path: Path) -> list[tuple[Any, ...]]:
    found = strapfmt.open(path).sql("select sequence_id, position, token_id from tokens order by row")
    return found.fetchall()


def test_tokens_called_input_are_rows(tmp_path: Path) -> None:
    model = Hooked(padding_side="right")
    assert is_lens(model)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with strapfmt.capture(model, tmp_path / "a.strap", sites="**.resid_post", quiet=True) as cap:
        out = model(IDS)
        model(input=IDS, attention_mask=mask)
        model(IDS[0])
    plain = [(s, p, int(IDS[s, p])) for s in range(2) for p in range(3)]
    padded = [(2, 0, 6), (2, 1, 7), (3, 0, 9), (3, 1, 8), (3, 2, 7)]
    assert tokens(cap.path) == [*plain, *padded, (4, 0, 5), (4, 1, 6), (4, 2, 7)]
    stored = torch.as_tensor(strapfmt.open(cap.path)["blocks.1.resid_post"][:6])
    assert torch.equal(stored, out.flatten(0, 1))


def test_embeddings_called_input_number_their_own_rows(tmp_path: Path) -> None:
    model = Hooked()
    with strapfmt.capture(model, tmp_path / "a.strap", sites="blocks.*.resid_post", quiet=True) as cap:
        model(torch.randn(2, 3, 8))
    assert tokens(cap.path) == []
    assert "number their own rows" in "".join(cap.report.notes)


def test_input_of_another_module_is_no_tokens(tmp_path: Path) -> None:
    model = Hooked()
    del model.cfg.d_vocab
    assert not is_lens(model)
    with strapfmt.capture(model, tmp_path / "a.strap", sites="blocks.0", quiet=True) as cap:
        model(IDS)
    assert tokens(cap.path) == []


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Hooked(), {"past_kv_cache": object()}, "use_past_kv_cache=False"),
        (Hooked(padding_side="left"), {}, "pads on the left"),
    ],
)
def test_tokens_that_cannot_be_known_are_an_error(
    model: Hooked, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(CaptureError, match=message),
        strapfmt.capture(model, tmp_path / "a.strap", sites="blocks.*.resid_post", quiet=True),
    ):
        model(IDS, **options)


@pytest.mark.parametrize("name", ["_module", "_model"])
def test_what_wraps_a_module_is_taken_for_it(name: str) -> None:
    module = torch.nn.Linear(2, 2)
    assert unwrapped(SimpleNamespace(**{name: module})) is module
    assert unwrapped(module) is module
    assert unwrapped(3) == 3
    with pytest.raises(ArgumentError, match="not loaded yet"):
        unwrapped(SimpleNamespace(**{name: torch.nn.Linear(2, 2, device="meta")}))
    with pytest.raises(ArgumentError, match=r"expected a torch\.nn\.Module"):
        strapfmt.sites(SimpleNamespace(**{name: 3}))
