"""Where a run's time goes: FLOPs, compilations, the clock and the profile."""

import logging
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_says, logged

from minigpt_jax.config import ModelConfig
from minigpt_jax.models.flops import flops_per_token
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params
from minigpt_jax.training import clock as clock_module
from minigpt_jax.training.callbacks import Profile
from minigpt_jax.training.clock import Clock
from minigpt_jax.training.compilations import Compilations, what_changed
from minigpt_jax.training.profile import Operation, operation_names, operations, readable


@pytest.mark.parametrize("choices", [{}, {"activation": "swiglu"}, {"num_kv_heads": 1}, {"num_layers": 3, "ff_dim": 96}])
def test_flops_per_token_are_six_per_matmul_weight_plus_causal_attention(choices):
    sizes = {"num_layers": 2, "embed_dim": 16, "ff_dim": 64, "vocab_size": 11, "context_length": 32}
    config = ModelConfig(**sizes | choices)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), GPT(config)))
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "kernel" in jax.tree_util.keystr(path)]
    weights = sum(leaf.size for leaf in kernels)
    # Two T x T x D products of two operations each; causal: half of the pairs; forward and backward: three times as many.
    attention = config.num_layers * 2 * 2 * 32 * 32 * 16 / 2 * 3 / 32
    assert flops_per_token(config) == 6 * weights + attention


@pytest.fixture
def double():
    """A new function for each test, since JAX caches compiled programs by function."""

    def double(x):
        return 2 * x

    return double


def test_compilations_are_recorded_by_name_while_the_context_is_open(double):
    with Compilations() as compilations:
        jax.jit(double)(jnp.ones(3)).block_until_ready()
    names = [name for name, _ in compilations.programs]
    assert names.count("double") == 1
    assert 0 < compilations.seconds == sum(seconds for _, seconds in compilations.programs)
    num_programs = len(names)
    jax.jit(double)(jnp.ones(4))
    assert len(compilations.programs) == num_programs


def test_a_recompilation_logs_a_warning_with_its_reason(double, caplog):
    with Compilations() as compilations:
        wrapped = compilations.warn_on_recompilation(jax.jit(double))
        with caplog.at_level(logging.WARNING):
            assert wrapped(jnp.ones(3)).tolist() == [2, 2, 2]
            wrapped(jnp.zeros(3))
            assert not caplog.records
            wrapped(jnp.ones(5))
    [warning] = logged(caplog, "WARNING")
    assert_says(warning, "double", "[0]", "float32[3]", "float32[5]")


def test_reasons_for_a_recompilation():
    def types(tree):
        return jax.tree.map(jax.typeof, tree)

    before = types({"a": jnp.ones(3), "b": jnp.ones(2)})
    one = what_changed(before, types({"a": jnp.ones(3), "b": jnp.exp(1.0)}))
    assert_says(one, "['b']", "float32[2]", "~float32[]")
    assert "['a']" not in one
    both = what_changed(before, types({"a": jnp.ones(4), "b": jnp.ones(3)}))
    assert_says(both, "['a']", "float32[3]", "float32[4]", "1")
    assert "['b']" not in both
    structure = what_changed(before, types({"a": jnp.ones(3)}))
    assert structure
    assert "float32" not in structure
    assert "JAX" not in structure
    assert_says(what_changed(before, before), "JAX_EXPLAIN_CACHE_MISSES=1")


def test_operations_are_named_after_layers_of_the_model():
    inner = "transformer/block_11/feed_forward/up/dot_general"
    assert readable(f"jit(train_step)/jvp(GPT)/{inner}") == "transformer/block/feed_forward/up/dot_general"
    assert readable(f"jit(train_step)/while/body/closed_call/checkpoint/transpose(jvp(GPT))/{inner}").endswith(
        "dot_general, backward"
    )
    text = f"""
HloModule jit_train_step
  %dot.4 = f32[2,3]{{1,0}} dot(%a, %b), metadata={{op_name="jit(train_step)/jvp(GPT)/{inner}" source_line=3}}
  ROOT add_fusion.1 = (f32[]) fusion(%c), metadata={{op_name="jit(train_step)/add"}}
  while.2 = (s32[], f32[2,3]{{1,0}}) while(%tuple), body=%b, metadata={{op_name="jit(train_step)/while"}}
  copy.1 = f32[2] copy(%a)
"""
    assert operation_names(text) == {"dot.4": "transformer/block/feed_forward/up/dot_general", "add_fusion.1": "add"}


def run_at(workdir, step, num_steps):
    return SimpleNamespace(
        workdir=workdir, step=step, task=SimpleNamespace(num_steps=num_steps), clock=Clock(0.0, step), state=None
    )


@pytest.mark.parametrize(
    ("step_before", "num_steps", "ended_at", "traced"),
    [(0, 100, 100, (6, 10)), (40, 43, 43, (43, 43)), (0, 8, 8, (6, 8)), (0, 100, 7, (6, 7)), (0, 100, 5, None)],
)
def test_five_steps_are_traced_or_as_many_as_are_left(monkeypatch, tmp_path, step_before, num_steps, ended_at, traced):
    events, run, profile = [], run_at(tmp_path, step_before, num_steps), Profile()
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, profiler_options: events.append(run.step + 1))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(run.step))
    profile.begin(run)
    while run.step < ended_at:
        profile.before_step(run)
        run.step += 1
    profile.close()
    profile.close()
    assert events == ([] if traced is None else [*traced])
    assert profile.num_steps == (0 if traced is None else traced[1] - traced[0] + 1)


def test_the_clock_excludes_the_time_for_tracing(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, profiler_options: now.append(now.pop() + 100))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: now.append(now.pop() + 1000))
    run, profile = run_at(tmp_path, 0, 20), Profile()
    profile.begin(run)
    while run.step < 20:
        profile.before_step(run)
        run.step, now[0] = run.step + 1, now[0] + 1
    assert run.clock.lap(20, None) == 1.0


@pytest.mark.parametrize("failing", [None, "start_trace", "stop_trace"])
def test_a_profile_that_cannot_be_written_is_a_warning_and_training_continues(monkeypatch, tmp_path, caplog, failing):
    for name in ("start_trace", "stop_trace") if failing else ():
        error = RuntimeError("no\nspace") if name == failing else None
        monkeypatch.setattr(jax.profiler, name, Mock(side_effect=error))
    if not failing:
        (tmp_path / "profile").write_text("")
    run, profile = run_at(tmp_path, 0, 20), Profile()
    profile.begin(run)
    while run.step < 20:
        profile.before_step(run)
        run.step += 1
    profile.finish(run)
    [warning] = logged(caplog, "WARNING")
    assert_says(warning, f"{tmp_path}/profile")


def test_operations_are_per_step_and_only_of_the_given_program(monkeypatch, tmp_path):
    def event(instruction, module, nanoseconds, name=None):
        stats = [("hlo_op", instruction), ("hlo_module", module)]
        return SimpleNamespace(name=name or instruction, stats=stats, duration_ns=nanoseconds)

    def plane(name, *events):
        return SimpleNamespace(name=name, lines=[SimpleNamespace(events=events)])

    on_host = [event("dot.1", "jit_step", 3e6), event("add", "jit_step", 2e6), event("dot.1", "jit_other", 9e9)]
    unreadable = SimpleNamespace(name="Python's")
    planes = [plane("/host:CPU", *on_host, unreadable), plane("/device:GPU:0", event("dot.2", "jit_step", 3e6, "kernel"))]
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: SimpleNamespace(planes=planes))
    (tmp_path / "some.xplane.pb").write_text("")
    text = """HloModule jit_step, entry
  %dot.1 = f32[2] dot(%a, %b), metadata={op_name="jit(step)/block_0/dot"}
  %dot.2 = f32[2] dot(%a, %b), metadata={op_name="jit(step)/block_1/dot"}
  %add = f32[2] add(%a, %b), metadata={op_name="jit(step)/add"}
"""
    assert operations(tmp_path, text, num_steps=2) == [Operation("block/dot", 3.0, 0.75), Operation("add", 1.0, 0.25)]
