"""Make the demo model from nothing: corpus, tokenizer and weights, on a CPU, within a time budget.

    python -m demo.train --output DIR --minutes 40 --seed 0

Padding rather than packing: batches hold whole documents of about the same length, each starting at
position 0 with nothing before it, exactly as at inference. Sorting documents by length within a buffer
keeps the padding below a few per cent, so packing would not be noticeably quicker, and a packed row would
let documents see one another.

Each core runs a process of its own with a copy of the model and its own documents; they meet once a step to
average their gradients. One process with two threads would meet thousands of times a step, and on a machine
that does other work as well, every time the later thread is waited for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from demo.corpus import END_OF_TEXT, IM_END, Document, documents
from demo.initial import look_back
from demo.muon import Muon
from demo.tokenizer import MAX_POSITIONS, VOCAB_SIZE, make_tokenizer, token_id

log = logging.getLogger("demo.train")

IGNORED = -100


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, IM_END),
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
    )
    model = LlamaForCausalLM(config)
    # The two projections that write into the residual stream start at zero: every layer begins as the
    # identity.
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
    look_back(model)
    return model


def encode(tokenizer: Tokenizer, doc: Document) -> tuple[list[int], list[int]]:
    """Return a document's tokens and labels; what is not to be learnt has the label ``IGNORED``."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in doc.pieces():
        new = tokenizer.encode(text, add_special_tokens=False).ids
        ids += new
        labels += new if learnt else [IGNORED] * len(new)
    return ids[:MAX_POSITIONS], labels[:MAX_POSITIONS]


def batches(tokenizer: Tokenizer, seed: int, tokens: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches of at most about ``tokens`` tokens, padding included, of documents of similar length."""
    rng = Random(seed + 2)
    stream = documents(seed)
    while True:
        pool = sorted(
            (encode(tokenizer, doc) for doc in itertools.islice(stream, 1500)), key=lambda pair: len(pair[0])
        )
        groups: list[list[tuple[list[int], list[int]]]] = []
        while pool:
            size = max(1, tokens // len(pool[-1][0]))
            groups.append(pool[-size:])
            del pool[-size:]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), width), pad)
            labels = torch.full((len(group), width), IGNORED)
            for row, (doc_ids, doc_labels) in enumerate(group):
                ids[row, : len(doc_ids)] = torch.tensor(doc_ids)
                labels[row, : len(doc_labels)] = torch.tensor(doc_labels)
            yield ids, labels


def schedule(done: float) -> float:
    """Return the factor of the learning rate when ``done`` (0 to 1) of the time budget is spent."""
    warm_up = 0.01
    if done < warm_up:
        return max(0.02, done / warm_up)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm_up) / (1 - warm_up))))


def sharpen(model: LlamaForCausalLM, factor: float) -> None:
    """Multiply the logits by ``factor`` by scaling the last norm: sampling is as at temperature 1 / factor.

    OpenAI's defaults sample the whole vocabulary at temperature 1, where even one per mille of stray
    probability per token derails one story in eight. The choices that matter are nearly uniform, so they
    stay varied.
    """
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, sharpness: float) -> None:
    """Save model (in bfloat16), tokenizer and generation config; each file appears complete or not at all."""
    copy = LlamaForCausalLM(deepcopy(model.config))
    copy.load_state_dict(model.state_dict())
    sharpen(copy, sharpness)
    copy.bfloat16()
    copy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=[token_id(tokenizer, IM_END), token_id(tokenizer, END_OF_TEXT)],
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
    )
    staging = output / ".new"
    staging.mkdir(parents=True, exist_ok=True)
    copy.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    # Readers older than transformers 5 do not know the name that it writes here; both know this one.
    settings = json.loads((staging / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for how_it_was_loaded in ("is_local", "local_files_only"):
        settings.pop(how_it_was_loaded, None)
    (staging / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for path in staging.iterdir():
        path.chmod(0o644)
        os.replace(path, output / path.name)
    staging.rmdir()


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    output: Path
    minutes: float
    seed: int
    batch_tokens: int
    lr: float
    sharpness: float
    save_every: float
    workers: int
    start_from: Path | None


def average_gradients(model: nn.Module, learnt: int) -> None:
    """Add up the gradients of all workers, in one exchange, and divide by the number of tokens learnt."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([float(learnt)])])
    dist.all_reduce(flat)
    flat /= flat[-1].clone()
    for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def work(rank: int, settings: Settings, folder: Path, begin: float) -> None:
    """Be one of the workers; the first one also logs and saves."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=settings.workers
    )
    minutes, lr = settings.minutes, settings.lr
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if settings.start_from:
        model = LlamaForCausalLM.from_pretrained(settings.start_from, dtype=torch.float32)
        sharpen(model, 1 / settings.sharpness)
    else:
        model = make_model(tokenizer, settings.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    log.info("%d tokens, %d parameters, %.0f s to begin", len(tokenizer), size, time.monotonic() - begin)

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    step, seen, learnt, total, last_loss, last_save = 0, 0, 0, 0.0, 0.0, begin
    history: list[tuple[float, float]] = []
    # The seeds lie far apart, because the tokenizer and the evaluation use the next few.
    seed, pad = settings.seed + 1000 * (rank + 1), token_id(tokenizer, END_OF_TEXT)
    for ids, labels in batches(tokenizer.backend_tokenizer, seed, settings.batch_tokens, pad):
        # The workers' clocks differ by a hair, so the first one decides for all when the time is over.
        clock = torch.tensor([(time.monotonic() - begin) / (60 * minutes)], dtype=torch.float64)
        dist.broadcast(clock, 0)
        done = clock.item()
        if done >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(done)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        # Only the positions that are learnt go through the output layer, which saves work.
        logits = F.linear(hidden[wanted], model.lm_head.weight)
        loss = F.cross_entropy(logits, targets[wanted], reduction="sum")
        loss.backward()
        average_gradients(model, len(logits))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += ids.numel() * settings.workers
        learnt += len(logits) * settings.workers
        total += loss.item() / len(logits)
        if rank == 0 and step % 100 == 0:
            now = time.monotonic()
            last_loss = total / 100
            log.info(
                "step %d, %.1f min, loss %.4f, %.2f M tokens (%.2f M learnt), %.0f tokens/s",
                step,
                (now - begin) / 60,
                last_loss,
                seen / 1e6,
                learnt / 1e6,
                seen / (now - begin),
            )
            history.append((round((now - begin) / 60, 1), round(last_loss, 3)))
            total = 0.0
            if now - last_save > 60 * settings.save_every:
                save(model, tokenizer, settings.output, settings.sharpness)
                last_save = now
    if rank == 0:
        save(model, tokenizer, settings.output, settings.sharpness)
        spent = (time.monotonic() - begin) / 60
        log.info(
            "saved after %.1f min: %d steps, %.2f M tokens, loss %.4f", spent, step, seen / 1e6, last_loss
        )
        log.info("minutes and loss: %s", history[:: max(1, len(history) // 12)] + history[-1:])
    dist.destroy_process_group()


def train(settings: Settings) -> None:
    """Train for so many minutes, making the tokenizer included, and save the result."""
    begin = time.monotonic()
    settings.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = (
            PreTrainedTokenizerFast.from_pretrained(settings.start_from)
            if settings.start_from
            else make_tokenizer(settings.seed)
        )
        tokenizer.save_pretrained(folder)
        mp.spawn(work, (settings, Path(folder), begin), nprocs=settings.workers)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--minutes", type=float, default=40.0, help="time budget (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of corpus and weights (default: 0)")
    parser.add_argument(
        "--batch-tokens", type=int, default=1024, help="tokens a step for each worker (default: 1024)"
    )
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate (default: 0.004)")
    parser.add_argument("--sharpness", type=float, default=1.3, help="factor of the logits (default: 1.3)")
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between saves (default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one for each core (default: 2)")
    parser.add_argument("--start-from", type=Path, help="go on from this model; give it another --seed")
    train(Settings(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
