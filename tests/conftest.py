"""What every test shares: environment, run-time shape checks, data, Ray, and models small enough for a CPU."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Libraries read these when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
torch.set_num_threads(1)  # tensors are tiny here, and threads that wait for each other cost more than they give

# Shapes and types of the maths are checked on every call. The hook only sees modules imported after it.
CHECKED = [
    "batches",
    "metrics",
    *(
        f"graph.{name}"
        for name in ("build", "csr", "encoder", "export", "losses", "negatives", "permutation", "sampler", "table")
    ),
    *(f"tokenizer.{name}" for name in ("kway", "losses")),
    *(f"llm.{name}" for name in ("choices", "collator", "losses", "model", "prompts", "windows")),
    *(f"diffusion.{name}" for name in ("denoiser", "objective", "sampler")),
    *(
        f"retrieval.{name}"
        for name in ("dense", "faiss_index", "hybrid", "scann_index", "segments", "text", "tree_index")
    ),
]
install_import_hook([f"ctd_scale.{name}" for name in CHECKED], "beartype.beartype")

# A busy machine is no failure.
settings.register_profile("ctd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ctd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The ready-made real sets."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CTD_DATA_DIR") or default)
    if not folder.is_dir():
        pytest.skip(f"the real sets are not in {folder}; CTD_DATA_DIR says where they are")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private Ray for all tests of this process, in a folder of its own (short: socket paths are limited)."""
    import ray

    from ctd_scale import training

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        training.start_ray()
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


class OneWorker:
    """Stands for Ray Train: a loop runs in this process as the only worker, and may be killed at a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained: dict[str, tuple[Callable[[dict[str, Any]], None], dict[str, Any], Path]] = {}
        self.restart()

    def restart(self, die_at: int = 0) -> None:
        """Forget everything; the next run starts anew and is killed right after its checkpoint `die_at` (1-based)."""
        self.checkpoints: list[Path] = []
        self.steps: list[int] = []
        self.curves: list[dict[str, float]] = []
        self.die_at = die_at

    def run(self, loop: Callable[[dict[str, Any]], None], arguments: dict[str, Any]) -> Path:
        """Run a loop to its end; returns what it exported."""
        from ctd_scale.config_resources import StageResources

        loop({**arguments, "logs": str(self.folder / "logs"), "resources": StageResources().model_dump()})
        return self.checkpoints[-1] / "export"

    def run_training(self, loop: Callable[[dict[str, Any]], None], arguments: Any, *, stage: str, **_: Any) -> Path:
        """What replaces `training.run_training`: always a fresh start. `trained` says of each stage how, and where its
        export is."""
        self.restart()
        export = self.run(loop, arguments)
        self.trained[stage] = (loop, arguments, export)
        return export

    def report_checkpoint(self, metrics: Any, write: Callable[[Path], None], *, every_rank: bool = False) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        write(folder)
        self.checkpoints.append(folder)
        if self.die_at == len(self.checkpoints):
            self.die_at = 0
            raise KeyboardInterrupt

    @contextmanager
    def latest_checkpoint(self, arguments: Any) -> Iterator[Path | None]:
        yield self.checkpoints[-1] if self.checkpoints else None


@contextmanager
def _in_this_process(folder: Path) -> Iterator[OneWorker]:
    from ctd_scale import training

    worker = OneWorker(folder)
    folder.mkdir()

    class StepLog:
        def __init__(self, logs: str, total_steps: int) -> None:
            self.total_steps = total_steps

        def step(self, step: int, scalars: dict[str, Any]) -> None:
            assert step <= self.total_steps
            worker.steps.append(step)
            worker.curves.append(
                {name: float(value() if callable(value) else value) for name, value in scalars.items()}
            )

        def close(self) -> None:
            pass

    def prepare_worker(arguments: Any, seed: int) -> torch.device:
        training.seed_all(seed)
        return torch.device("cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare_worker", prepare_worker)
        patch.setattr(training, "rank", lambda: 0)
        patch.setattr(training, "local_rank", lambda: 0)
        patch.setattr(training, "world_size", lambda: 1)
        patch.setattr(training, "latest_checkpoint", worker.latest_checkpoint)
        patch.setattr(training, "report_checkpoint", worker.report_checkpoint)
        patch.setattr(training, "report", lambda metrics: None)
        patch.setattr(training, "run_training", worker.run_training)
        patch.setattr(training, "StepLog", StepLog)
        yield worker


@pytest.fixture(scope="session")
def in_this_process() -> Callable[[Path], AbstractContextManager[OneWorker]]:
    """`with in_this_process(folder):` training loops run in this process, without Ray; the folder is made."""
    return _in_this_process


@pytest.fixture
def one_worker(tmp_path: Path) -> Iterator[OneWorker]:
    """Training loops in this process, without Ray."""
    with _in_this_process(tmp_path / "worker") as worker:
        yield worker


@pytest.fixture(scope="session")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all tests of this process: DeepSpeed keeps the first that it sees."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def process_group(group_of_one: None) -> Iterator[None]:
    """This process as a group of its own: what DeepSpeed needs to train in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("DS_ACCELERATOR", "cpu")  # which the loop sets; later tests may have a GPU
        yield


CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def text_tokenizer() -> Any:
    """A byte-level BPE with special tokens and a chat template: any text can be written in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>", "<|end|>", "<|pad|>"],
        show_progress=False,
    )
    raw.train_from_iterator(["The user might like products, such as this one."], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory, text_tokenizer: Any) -> Path:
    """A folder with a random two-layer Llama and its text tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(text_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class TinyChain:
    """A published preference model over a small catalogue: nothing in it is trained, everything is random."""

    folder: Path
    log: Any
    tokens: Any
    config: Any

    def preference(self) -> Any:
        from ctd_scale.llm.inference import PreferenceModel

        return PreferenceModel(self.folder, self.tokens, self.log.catalogue, self.config)


@pytest.fixture(scope="session")
def tiny_chain(tmp_path_factory: pytest.TempPathFactory, backbone: Path, text_tokenizer: Any) -> TinyChain:
    """Users of 2 to 14 interactions, 20 items with titles of unlike length, 2 ways, fp32."""
    from ctd_scale.batches import Catalogue, InteractionLog, NodeArrays
    from ctd_scale.config import LLMConfig
    from ctd_scale.llm.train import new_model
    from ctd_scale.llm.weights import BACKBONE, export_model

    random = np.random.default_rng(0)
    items, lengths = 20, [2, 3, 4, 7, 9, 14]
    log = InteractionLog(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=random.integers(0, items, sum(lengths)).astype(np.int32),
        user_ids=[str(user) for user in range(len(lengths))],
        catalogue=Catalogue(
            [str(item) for item in range(items)],
            [f"no. {item}" + " of a long name" * (item % 3) for item in range(items)],
            ["odd" if item % 2 else "" for item in range(items)],
        ),
    )
    tokens = NodeArrays(
        random.standard_normal((len(lengths), 2, 32)).astype(np.float32),
        random.standard_normal((items, 2, 32)).astype(np.float32),
    )
    config = LLMConfig(
        backbone=str(backbone), num_hidden_layers=2, max_history=5, dtype="float32", preference_dim=12, max_new_tokens=6
    )
    folder = tmp_path_factory.mktemp("tiny_chain")
    model = new_model(config, backbone, random.standard_normal((items, 12)).astype(np.float32), seed=0)
    with torch.no_grad():  # an adapter that starts at the identity would hide its faults
        model.adapter.correction.weight.normal_(std=0.1)
    export_model(folder, model, {}, torch.float32)
    text_tokenizer.save_pretrained(folder / BACKBONE)
    return TinyChain(folder, log, tokens, config)
