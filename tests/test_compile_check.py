"""compile_check on a tiny model: its table against what can be worked out from the shapes, and its exit."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tapo_jax.bench import model
from tapo_jax.compile_check import check, estimate, programs
from tapo_jax.compile_check.programs import Program
from tapo_jax.config import beside
from tapo_jax.models import flops
from tapo_jax.models.image_processor import ImageProcessor

ROOT = Path(__file__).parents[1]
V5E = flops.CHIPS["TPU v5 lite"]
needs_tpu_compiler = pytest.mark.skipif(platform.machine() != "x86_64", reason="libtpu exists for x86-64 alone")


@dataclasses.dataclass
class Memory:
    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int


class Compiled:
    """Stands in for jax's lowered and compiled program."""

    def __init__(self, memory=None, error=""):
        self.memory, self.error = memory, error

    def compile(self):
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        return self

    def memory_analysis(self):
        return self.memory

    def as_text(self):
        return (
            "ENTRY %main () -> f32[8,16] {\n"
            "  %a = f32[8,16]{1,0} parameter(0)\n  %w = f32[16,16]{1,0} parameter(1)\n"
            "  ROOT %y = f32[8,16]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
        )


@dataclasses.dataclass
class Run:
    mesh: jax.sharding.AbstractMesh


RUN = Run(jax.sharding.AbstractMesh((4,), ("fsdp",)))
GIB = 2**30


def report(compiled: Compiled, **more) -> check.Report:
    return check.report(RUN, Program("train", lambda: compiled, 4 * 2048.0, **more), V5E)


def test_donated_arguments_count_once_and_neighbours_count():
    # 5 of arguments, 5 of results of which 4 take the arguments' place, 6 of temporaries, 1 of what lies beside: 13 GiB
    # of 16.
    found = report(Compiled(Memory(5 * GIB, 5 * GIB, 4 * GIB, 6 * GIB, 0)), beside=1 * GIB)
    assert (found.peak / GIB, found.fits, found.capacity / GIB) == (13, True, 16)
    assert not report(Compiled(Memory(5 * GIB, 5 * GIB, 4 * GIB, 6 * GIB, 0)), beside=5 * GIB).fits


def test_flops_are_of_one_chip():
    # The program does 2 · 8 · 16 · 16 = 4,096 flops on a chip; the model's own count of all four chips is 8,192.
    found = report(Compiled(Memory(1, 1, 1, 1, 0)))
    assert (found.flops, found.model_flops) == (4096, 2048)
    assert check.row(found)[check.COLUMNS.index("ratio")] == "2.00"


def test_what_the_compiler_cannot_place_does_not_fit():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.51G of 15.75G hbm. Exceeded by 6.76G."
    found = report(Compiled(error=message))
    assert (found.fits, found.error) == (False, "Used 22.51G of 15.75G hbm")
    assert "| no |" in check.markdown(check.COLUMNS, [check.row(found)])


def test_other_errors_of_the_compiler_are_not_swallowed():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        report(Compiled(error="INTERNAL: something else"))


def model_directory(path: Path) -> Path:
    """Shapes alone: a configuration without weights."""
    (path / "config.json").write_text(json.dumps(model.ATLAS.to_hf()))
    processor = ImageProcessor(patch=8, max_pixels=128 * 128)
    (path / "preprocessor_config.json").write_text(json.dumps(processor.to_hf()))
    return path


def abstract(tmp_path: Path, **changes):
    """The test config's run on four devices, as shapes."""
    config = beside(str(ROOT / "configs" / "x"), "tapo_grpo.py")("test")
    config.model.path = str(model_directory(tmp_path))
    config.mesh.update(data=1, fsdp=2, tensor=2)
    config.update_from_flattened_dict(changes)
    return programs.abstract_run(config, jax.devices()[:4])


def test_a_model_that_is_not_covered_is_the_users_mistake(tmp_path):
    raw = model.ATLAS.to_hf() | {"model_type": "qwen3_vl_moe"}
    directory = model_directory(tmp_path)
    (directory / "config.json").write_text(json.dumps(raw))
    config = beside(str(ROOT / "configs" / "x"), "tapo_grpo.py")("test")
    config.model.path = str(directory)
    with pytest.raises(check.UserError, match="a mixture of experts; dense models only"):
        programs.model_shapes(config.model)


def test_low_rank_updates_are_checked_as_they_are_trained(tmp_path):
    """Adam's moments are of the low-rank parameters alone, and the gradient reaches them: the update's program has a
    product for each of them, which a program without a backward pass has not."""
    plain = abstract(tmp_path)
    lora = abstract(tmp_path, **{"model.lora_rank": 4})
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(lora.params)}
    assert any("q_lora_a" in name for name in names)
    assert programs.bytes_of_one(lora.opt_state) < 0.2 * programs.bytes_of_one(plain.opt_state)
    assert programs.bytes_of_one(lora.params) > programs.bytes_of_one(plain.params)
    shapes = lambda run: programs.train_program(run).lower().as_text().count("dot_general")  # noqa: E731
    assert shapes(lora) > 1.5 * programs.log_probs_program(lora).lower().as_text().count("dot_general")


def test_a_reference_model_is_checked_too(tmp_path):
    """Its weights stay on the chips in every program, and its log-probabilities are a program of their own."""
    plain, pulled = abstract(tmp_path), abstract(tmp_path, **{"algorithm.kl_coef": 0.1})
    held = programs.bytes_of_one(pulled.params)
    assert not programs.has_reference(plain.config) and programs.has_reference(pulled.config)
    assert programs.train_program(pulled).beside == held and programs.train_program(plain).beside == 0
    for name in ("extend", "decode"):
        found = [programs.PROGRAMS[name](run).beside for run in (plain, pulled)]
        assert found[1] == found[0] + held, name
    assert programs.log_probs_program(pulled).beside == held + programs.bytes_of_one(pulled.opt_state)
    assert "loss/kl" in str(programs.train_program(pulled).lower().out_info[1].keys())


def test_a_layout_of_its_own_puts_the_sampler_s_weights_beside_the_parameters(tmp_path):
    """Two devices share the heads, and each pair has all weights: of a kernel a device holds half, in place of the
    quarter of training. In the layout of training the weights are the parameters, and there is no program."""
    plain, own = abstract(tmp_path), abstract(tmp_path, **{"rollout.mesh.tensor": 2})
    assert programs.reshard_program(plain) is None
    beside = [programs.decode_program(run).beside - programs.bytes_of_one(run.opt_state) for run in (plain, own)]
    kernels = [x for x in jax.tree.leaves(own.params) if x.sharding.shard_shape(x.shape) != x.shape]
    assert beside[0] == 0 and beside[1] == pytest.approx(programs.bytes_of_one(kernels), rel=0.05)
    made = programs.reshard_program(own).lower().compile().output_shardings
    assert {tuple(layout.mesh.shape.values()) for layout in made.values()} == {(2, 1, 2)}
    gate = own.params["decoder"]["gate"]
    L, D, M = gate.shape
    assert gate.sharding.shard_shape(gate.shape) == (L, D // 2, M // 2)
    assert made["decoder", "gate"].shard_shape(gate.shape) == (L, D, M // 2)


def test_twice_the_conversations_take_the_memory_of_half_of_them_in_as_many_pages(tmp_path):
    """A page of each shard is nobody's. The programs take a table of the pages of their rows."""
    plain = abstract(tmp_path)
    rollout = plain.config.rollout
    width = -(-rollout.max_length // 16)
    paged = abstract(
        tmp_path,
        **{"rollout.slots": 2 * rollout.slots, "rollout.page_size": 16, "rollout.pages": rollout.slots * width},
    )
    sizes = [programs.bytes_of_one((run.state.k, run.state.v)) for run in map(programs.abstract_slots, (plain, paged))]
    shards = 2
    pages = rollout.slots * width // shards
    assert sizes[1] == pytest.approx(sizes[0] * (pages + 1) * 16 / (rollout.slots // shards * rollout.max_length))
    found = programs.abstract_slots(paged).table(5, rollout.max_length)
    assert found.shape == (shards, 5, width) and programs.abstract_slots(plain).table(5, rollout.max_length) is None
    for name in ("decode", "extend"):
        program, half = (programs.PROGRAMS[name](run) for run in (paged, plain))
        assert program.tokens >= half.tokens * (2 if name == "decode" else 1)
        assert f"x{width}xi32>" in program.lower().as_text() and f"x{width}xi32>" not in half.lower().as_text()


def test_low_rank_updates_lie_beside_the_merged_weights(tmp_path):
    run = abstract(tmp_path, **{"model.lora_rank": 4})
    found = programs.abstract_slots(run).reshard.beside(run.params)
    assert {path[-1] for path in found} == {
        f"{name}{end}" for name in ("q", "k", "v", "o", "gate", "up", "down") for end in ("", "_lora_a", "_lora_b")
    }
    program = programs.reshard_program(run)
    assert program is not None and "lora" not in str(program.lower().out_info.keys())


def test_the_time_of_a_rollout_and_of_a_step_is_worked_out_from_the_programs():
    """1,024 episodes of 1,000 tokens, 400 of them written, on four chips. A chunk draws 256 tokens and takes 2 s of
    full slots, 1.5 s of half full ones: 1,600 chunks of 1.5 s. An extension adds 1,024 tokens in 3 s: 600 of them."""
    config = beside(str(ROOT / "configs" / "x"), "tapo_grpo.py")("test")
    config.data.prompts_per_step, config.rollout.group_size, config.rollout.max_length = 128, 8, 1000
    config.train.updates_per_batch, config.rollout.mesh.tensor = 2, 2
    run = SimpleNamespace(config=config, mesh=RUN.mesh)
    blank = check.Report("", True, 0.0)
    reports = {
        "reshard": dataclasses.replace(blank, seconds=5.0),
        "decode": dataclasses.replace(
            blank, seconds=2.0, seconds_memory=1.9, seconds_flops=0.1, tokens=256,
            seconds_filled={"half": 1.5, "third": 1.0},
        ),
        "extend": dataclasses.replace(blank, seconds=3.0, tokens=1024),
        "train": dataclasses.replace(blank, seconds=100.0),
    }  # fmt: skip
    found = estimate.speed(reports, run, 400)
    assert (found["tokens_per_s_per_chip"], found["tokens_per_s_per_chip_third"]) == (32, 64)
    assert (found["decode"], found["extend"], found["rollout"]) == (2400, 1800, 4205)
    assert (found["updates"], found["step"], found["limit"]) == (200, 4405, "memory")
    assert estimate.row(found, "m", "4 v5e")[2:6] == ["2 × 2", "32", "64", "memory"]
    without = estimate.speed({name: reports[name] for name in ("decode", "train")}, run, 400)
    assert "rollout" not in without and "step" not in without
    assert estimate.speed({"train": reports["train"]}, run, 400) == {}


def test_what_limits_a_program_is_its_slowest_part():
    blank = check.Report("", True, 0.0, seconds=2.0, seconds_network=1.0, seconds_memory=1.5, seconds_flops=0.5)
    assert estimate.limit(blank) == "memory"
    assert estimate.limit(dataclasses.replace(blank, seconds_flops=1.9)) == "arithmetic"
    assert estimate.limit(dataclasses.replace(blank, seconds_network=2.0)) == "links"


@needs_tpu_compiler
def test_the_programs_of_the_test_config_compile_for_a_tpu(tmp_path):
    """Four v5e chips, two sharing the parameters, two the heads: rows 16 over 2, heads and vocabulary over 2."""
    pytest.importorskip("libtpu")
    command = [
        sys.executable, "launch/compile_check.py", "--config=configs/tapo_grpo.py:test", "--topology=v5e:2x2",
        f"--config.model.path={model_directory(tmp_path)}", "--config.mesh.data=1", "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2", "--config.rollout.mesh.tensor=2", "--programs=train,reshard,decode",
        f"--out={tmp_path / 'out.json'}",
    ]  # fmt: skip
    environment = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| train |" in done.stdout and "| decode |" in done.stdout
    train, reshard, decode = json.loads((tmp_path / "out.json").read_text())["programs"]
    assert train["fits"] and decode["fits"] and reshard["fits"]
    assert reshard["seconds_network"] > 0 and "| a third full |" in done.stdout
    # Parameters and two moments, float32, at least a quarter on each chip; norms and biases are on all of them.
    count = 1_133_000
    assert 12 * count / 4 < train["arguments"]
    # The update computes a little more than the model's own count, which knows of no padding; never less.
    assert 1.0 <= train["flops"] / train["model_flops"] < 2.0
    assert {"all-gather", "all-reduce"} & set(train["collectives"])
    assert decode["seconds"] > 0


def test_an_unknown_topology_is_the_users_mistake():
    with pytest.raises(check.UserError, match="--topology=v5e:3x5 cannot be compiled for here"):
        check.topology_devices("v5e:3x5")


def test_an_unknown_program_is_the_users_mistake():
    with pytest.raises(check.UserError, match="--programs is 'sing': choose one of train, log_probs, reshard"):
        check.run_check(None, "v5e:2x2", ("sing",))
