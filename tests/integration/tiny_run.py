"""A whole published run, made in a second: real artifacts with random weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctd_scale.artifacts import Run
from ctd_scale.batches import SPLITS, Catalogue, InteractionLog, NodeArrays, Preferences, Ranking, save_rankings
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.diffusion.denoiser import new_denoiser
from ctd_scale.diffusion.train import WEIGHTS
from ctd_scale.graph.train import DEGREES
from ctd_scale.llm.model import build_preference_lm
from ctd_scale.llm.prompts import INSTRUCTION, answer_text
from ctd_scale.llm.weights import BACKBONE, export_model, load_vectors
from ctd_scale.recommender import Recommender
from ctd_scale.retrieval.build import build_graph_index, build_index
from ctd_scale.retrieval.neighbors import count_neighbors

USERS, ITEMS, WAYS, TOKEN_DIM, COND_DIM = 60, 40, 2, 32, 16
LOST_USER = "nobody"  # in the log, without a single interaction
SPECIALS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
ADJECTIVES = ("Red", "Blue", "Quiet", "Golden", "Last", "Little", "Burning", "Silver")
NOUNS = ("River", "Night", "Machine", "Garden", "Empire")
CATEGORIES = ("drama", "comedy", "western", "crime")


def make_tiny_run(folder: Path, seed: int = 0, **retrieval: object) -> Run:
    """Publish every artifact that a recommendation needs under `folder`, in the order of the pipeline; `seed` is that
    of the weights, `retrieval` settings of it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(0)
    run, config = Run(str(folder), "tiny"), tiny_config(**retrieval)
    run.write_config(config)
    log = make_log(rng)
    digests: dict[str, str] = {}

    def publish(name: str, *inputs: str, **facts: object) -> AbstractContextManager[Path]:
        return run.publish(name, config_hash="tiny", inputs={each: digests[each] for each in inputs}, facts=facts)

    with publish("interactions", dataset="tiny") as target:
        log.save(target)
    digests["interactions"] = run.fetch("interactions").digest

    with publish("embeddings", "interactions", embed_dim=COND_DIM) as target:
        make_embeddings().save(target)
        items = NodeArrays.load(target).items
    digests["embeddings"] = run.fetch("embeddings").digest

    degrees = {split: np.bincount(log.known_edges(split)[1], minlength=ITEMS) for split in SPLITS}
    with publish("embeddings_at_test", "interactions", "embeddings") as target:
        make_embeddings().save(target)
        np.save(target / DEGREES, degrees["test"])
    digests["embeddings_at_test"] = run.fetch("embeddings_at_test").digest

    with publish("tokens", "interactions", num_ways=WAYS, token_dim=TOKEN_DIM) as target:
        make_tokens(rng).save(target)
    digests["tokens"] = run.fetch("tokens").digest

    with publish("models/llm", "interactions", "tokens", cond_dim=COND_DIM) as target:
        write_llm(target, log.catalogue, config)
        vectors = load_vectors(target)
    digests["models/llm"] = run.fetch("models/llm").digest

    with publish("models/diffusion", "models/llm", cond_dim=COND_DIM) as target:
        write_denoiser(target, config)
    digests["models/diffusion"] = run.fetch("models/diffusion").digest

    facts: dict[str, object] = {"items": ITEMS, "dim": COND_DIM, "engine": "exact"}
    with publish("index", "interactions", "embeddings", "embeddings_at_test", "models/llm", **facts) as target:
        trained = degrees["validation"]
        build_index(vectors, log.catalogue, config.retrieval, target, config.seed, degrees=trained)
        for split, known in degrees.items():
            near = count_neighbors(log, log.known_lengths(split), config.retrieval.neighbors)
            build_graph_index(items, known, config.retrieval, target, config.seed, [], split, near)
    digests["index"] = run.fetch("index").digest

    with publish("ranking", "interactions", "models/llm", "models/diffusion", "index") as target:
        full = Ranking(preference=1.0, draws=0.5, error=0.25, graph=0.5, neighbors=0.5)
        save_rankings({"full": full, "full_text": replace(full, pi=0.1)}, target)
    return run


def publish_preferences(run: Run) -> None:
    """What the LLM of the tiny run says of the users' histories before validation."""
    recommender = Recommender(run)
    log, users = recommender.log, recommender.log.split_users("validation")
    vectors = recommender.preference([log.history(user, "validation") for user in users.tolist()])
    inputs = {name: run.fetch(name).digest for name in ("interactions", "models/llm")}
    with run.publish("preferences", config_hash="tiny", inputs=inputs) as folder:
        known = Preferences(users.astype(np.int32), log.targets(users, "validation"), vectors, [""] * len(users))
        known.save(folder, "validation")


def tiny_config(**retrieval: object) -> RunConfig:
    """Dimensions of the tiny run; one replica of everything, a small queue and small limits."""
    return validate_config(
        {
            "graph": {"embed_dim": COND_DIM},
            "llm": {
                "backbone": "tiny",
                "preference_dim": COND_DIM,
                "max_history": 8,
                "dtype": "float32",
                "max_new_tokens": 6,
            },
            "diffusion": {
                "hidden_dim": 32,
                "num_draws": 4,
                "sampling_steps": 2,
                "error_candidates": 12,
                "error_evaluations": 2,
            },
            "retrieval": {"text_candidates": 5, **retrieval},
            "serving": {
                "max_replicas": 1,
                "max_ongoing_requests": 2,
                "max_queued_requests": 6,
                "max_batch_size": 4,
                "max_k": 50,
                "max_history": 20,
                "max_body_bytes": 4096,
            },
        },
        source="tiny",
    )


def make_log(rng: np.random.Generator) -> InteractionLog:
    """Random histories of 3 to 15 items for all users but the last, who has none."""
    lengths = np.append(rng.integers(3, 16, USERS - 1), 0)
    titles = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    return InteractionLog(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=rng.integers(0, ITEMS, lengths.sum()).astype(np.int32),
        user_ids=[f"u{user}" for user in range(USERS - 1)] + [LOST_USER],
        catalogue=Catalogue(
            item_ids=[f"i{item}" for item in range(ITEMS)],
            titles=titles,
            categories=[CATEGORIES[item % len(CATEGORIES)] for item in range(ITEMS)],
            # Every fifth has no price.
            attributes={"price": np.array([item / 2 if item % 5 else np.nan for item in range(ITEMS)])},
        ),
    )


def make_tokens(rng: np.random.Generator) -> NodeArrays:
    return NodeArrays(
        rng.standard_normal((USERS, WAYS, TOKEN_DIM)).astype(np.float32),
        rng.standard_normal((ITEMS, WAYS, TOKEN_DIM)).astype(np.float32),
    )


def make_embeddings() -> NodeArrays:
    rng = np.random.default_rng(5)
    return NodeArrays(*(rng.standard_normal((nodes, COND_DIM)).astype(np.float32) for nodes in (USERS, ITEMS)))


def write_llm(folder: Path, catalogue: Catalogue, config: RunConfig) -> None:
    """A random Llama of two layers with a word tokenizer of the catalogue."""
    text_tokenizer = make_text_tokenizer(catalogue)
    llama = LlamaConfig(
        vocab_size=len(text_tokenizer),
        hidden_size=TOKEN_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # large enough that answers differ between histories
        pad_token_id=text_tokenizer.pad_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        bos_token_id=text_tokenizer.eos_token_id,
    )
    vectors = torch.randn(ITEMS, COND_DIM)
    model = build_preference_lm(LlamaForCausalLM(llama), vectors, config.llm.temperature, learn_vectors=True)
    export_model(folder, model, {}, torch.float32)
    text_tokenizer.save_pretrained(folder / BACKBONE)


def make_text_tokenizer(catalogue: Catalogue) -> PreTrainedTokenizerFast:
    """One token per word of the prompts and titles."""
    tokenizer = Tokenizer(WordLevel(unk_token=SPECIALS["unk_token"]))
    tokenizer.pre_tokenizer = Whitespace()
    texts = [answer_text(*pair) for pair in zip(catalogue.titles, catalogue.categories, strict=True)]
    trainer = WordLevelTrainer(special_tokens=list(SPECIALS.values()), show_progress=False)
    tokenizer.train_from_iterator([INSTRUCTION, "Answer:", *texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIALS)


def write_denoiser(folder: Path, config: RunConfig) -> None:
    """A random denoiser whose blocks are not the identity that they start as."""
    denoiser = new_denoiser(COND_DIM, config.diffusion)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(denoiser.state_dict(), folder / WEIGHTS)
