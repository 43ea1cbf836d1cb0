"""Owns the recipe of the bundled demo model: corpus, tokenizer, training run and model card.

The whole recipe runs offline: the text is the docstrings of the running Python's standard library.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "idle_test", "site-packages", "__pycache__"})
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "strapfmt" / "demo_model"
VOCAB_SIZE = 2048
CONTEXT = 512
DEFAULT_NEW_TOKENS = 60
BATCH = 4
PEAK_LR = 3e-3
FINAL_LR_SHARE = 0.05
WARMUP_STEPS = 100
HELD_OUT_EVERY = 20

CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: en
library_name: transformers
---

# strapfmt demo model

A tiny Llama-architecture language model ({parameters:,} parameters, {layers} layers, hidden size {hidden},
{heads} query heads, {kv_heads} key/value heads, {vocab} byte-level BPE tokens, bfloat16), trained from
scratch so that examples and tests have a real `transformers` model to run offline. It writes text that
looks like Python documentation; it knows nothing, and is of no use beyond demonstrations.

- **Data**: the docstrings of the Python {python} standard library (test packages and idlelib left out),
  {documents:,} distinct docstrings, {tokens:,} training tokens. Nothing else was used.
- **Licence of the text**: Python Software Foundation License Version 2,
  {copyright} All Rights Reserved.
  (<https://docs.python.org/3/license.html>, which also lists the notices of incorporated software).
- **Training**: {steps} steps of {batch} x {context} tokens, AdamW, warm-up and cosine decay, seed {seed}.
- **Held-out loss**: {loss:.4f} nats per token (perplexity {perplexity:.1f}, {bits_per_byte:.3f} bits per
  byte), over {held_tokens:,} tokens from every {held_out_every}th source file, which training never saw;
  measured on the bfloat16 weights stored here. On its training documents the loss is {train_loss:.4f}: the
  corpus is small and was read about {epochs:.0f} times, so the model remembers much of it.

To reproduce (Python {python}; last digits depend on the library versions and the processor):

    python tools/train_demo_model.py --steps {steps} --seed {seed}

To load:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("strapfmt/demo_model")
    tokenizer = AutoTokenizer.from_pretrained("strapfmt/demo_model")
"""


def source_files(root: Path) -> list[Path]:
    """List the standard library's Python files in a fixed order, without tests and installed packages."""
    found = (path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def docstrings(path: Path) -> Iterator[str]:
    """Yield the module, class and function docstrings of one file, dedented, in source order."""
    tree = ast.parse(path.read_bytes(), filename=path.name)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = (ast.get_docstring(node) or "").strip()
            if text:
                yield text


def build_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Collect distinct docstrings and split them by source file.

    Returns
    -------
    tuple of list of str
        Training documents and held-out documents. A docstring that occurs in several files belongs to the
        first of them, so no held-out document is also a training document.
    """
    seen: set[str] = set()
    train: list[str] = []
    held_out: list[str] = []
    for index, path in enumerate(source_files(root)):
        side = held_out if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train
        fresh = [text for text in dict.fromkeys(docstrings(path)) if text not in seen]
        seen.update(fresh)
        side.extend(fresh)
    return train, held_out


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE tokenizer that puts ``<bos>`` in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[list[int]]:
    """Turn each document into ``<bos> text <eos>``."""
    eos = tokenizer.eos_token_id
    return [[*encoding.ids, eos] for encoding in tokenizer.backend_tokenizer.encode_batch(list(documents))]


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model and its generation defaults."""
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=DEFAULT_NEW_TOKENS, **special
    )
    return model


def learning_rate_share(step: int, steps: int) -> float:
    """Give the share of the peak learning rate to use at a step: linear warm-up, then cosine decay."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def window_starts(documents: Sequence[Sequence[int]]) -> torch.Tensor:
    """List where training windows may begin: at each document, and every half context inside long ones."""
    starts: list[int] = []
    offset = 0
    for tokens in documents:
        starts.extend(range(offset, offset + len(tokens), CONTEXT // 2))
        offset += len(tokens)
    return torch.tensor([start for start in starts if start + CONTEXT <= offset])


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))


def train(
    model: LlamaForCausalLM, documents: Sequence[Sequence[int]], bos: int, steps: int, seed: int
) -> None:
    """Train in place on random windows; every window begins with ``<bos>``."""
    stream = torch.tensor([token for tokens in documents for token in tokens])
    starts = window_starts(documents)
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer_for(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, steps))
    model.train()
    began = time.monotonic()
    for step in range(1, steps + 1):
        picked = starts[torch.randint(len(starts), (BATCH,), generator=generator)]
        batch = stream[picked[:, None] + torch.arange(CONTEXT)]
        batch[:, 0] = bos
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            seconds = time.monotonic() - began
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
    model.train(False)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Measure the mean loss per predicted token, each document on its own, cut at the context length.

    Returns
    -------
    tuple of float and int
        Mean negative log-likelihood in nats, and the number of tokens it was measured over.
    """
    total, count = 0.0, 0
    for tokens in documents:
        ids = torch.tensor([list(tokens[:CONTEXT])])
        logits = model(input_ids=ids).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count, count


def mean_bytes_per_token(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Sequence[int]]) -> float:
    """Measure how many bytes of text one predicted token stands for (``<eos>`` counts as none)."""
    cut = [list(tokens[1:CONTEXT]) for tokens in documents]
    texts = (tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True) for tokens in cut)
    return sum(len(text.encode()) for text in texts) / sum(map(len, cut))


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_tokens: Sequence[Sequence[int]],
    held_tokens: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Measure what the model card reports; every tenth training document stands for the training set."""
    loss, count = mean_loss(model, held_tokens)
    return {
        "loss": loss,
        "held_tokens": count,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / mean_bytes_per_token(tokenizer, held_tokens),
        "train_loss": mean_loss(model, train_tokens[::10])[0],
    }


def model_card(model: LlamaForCausalLM, facts: dict[str, float]) -> str:
    """Fill in the model card from the model's configuration and the facts of the run."""
    config = model.config
    return CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        python=platform.python_version(),
        copyright=sys.copyright.splitlines()[0],
        batch=BATCH,
        context=CONTEXT,
        epochs=facts["steps"] * BATCH * CONTEXT / facts["tokens"],
        held_out_every=HELD_OUT_EVERY,
        **facts,
    )


def sample(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Continue a prompt greedily."""
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights, configuration and tokenizer, naming a tokenizer class that transformers 4 knows too."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings_path = out / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write")
    parser.add_argument("--steps", type=int, default=2800, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the batch order")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    return parser.parse_args()


def main() -> None:
    """Build the corpus, train the tokenizer and the model, and write the folder."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    train_texts, held_texts = build_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(train_texts)
    train_tokens, held_tokens = encode(tokenizer, train_texts), encode(tokenizer, held_texts)
    counts = {"documents": len(train_texts) + len(held_texts), "tokens": sum(map(len, train_tokens))}
    print(f"corpus: {counts}, {len(held_texts)} documents held out", flush=True)

    model = new_model(tokenizer)
    train(model, train_tokens, tokenizer.bos_token_id, arguments.steps, arguments.seed)
    model.bfloat16()
    save(model, tokenizer, arguments.out)

    results = evaluate(model, tokenizer, train_tokens, held_tokens)
    print(results)
    facts = {**counts, **results, "steps": arguments.steps, "seed": arguments.seed}
    (arguments.out / "README.md").write_text(model_card(model, facts), encoding="utf-8")
    for prompt in ("Return a list of", "Return the number of"):
        print("---", sample(model, tokenizer, prompt), sep="\n")


if __name__ == "__main__":
    main()
