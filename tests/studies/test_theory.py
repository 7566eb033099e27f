"""The mathematics of the theory probes, by property: closed forms, exact cases and counterexamples, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridzoo.kernels import ContentGate
from hybridzoo.studies.theory import boundary, capacity, chunk, gradient, lengths, separation, stability, stacks
from hybridzoo.studies.theory.overwrite import QUERY, OneMixer, Overwrite
from hybridzoo.studies.theory.result import Settings
from hybridzoo.studies.theory.rule import (
    F64,
    Tokens,
    growth,
    kept,
    largest_error,
    orthogonal_keys,
    recall,
    run,
    started_tokens,
    transitions,
    unit_keys,
)
from hybridzoo.studies.theory.timing import median_seconds
from hybridzoo.studies.theory.trained import (
    FITS,
    Form,
    build,
    captures,
    content_up,
    count,
    frozen_gates,
    recorded,
    train_one,
)

SMALL = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@SMALL
@given(seeds, st.integers(1, 8), st.integers(1, 8), st.data())
def test_orthogonal_keys_are_recalled_exactly_up_to_k_whatever_v(seed, K, V, data):
    n = data.draw(st.integers(1, K))
    keys = orthogonal_keys(2, n, K, draw(seed))
    values = torch.randn(2, n, V, generator=draw(seed + 1), dtype=F64)
    assert largest_error(recall(keys, values), values) < 1e-12


@SMALL
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_no_state_holds_more_than_k_generic_pairs(seed, K, V):
    keys = unit_keys(1, K + 1, K, generator=draw(seed))
    values = torch.randn(1, K + 1, V, generator=draw(seed + 1), dtype=F64)
    assert largest_error(capacity.best_read(keys, values), values) > 1e-6


@SMALL
@given(seeds, st.integers(2, 8), st.integers(1, 4), st.data())
def test_the_delta_rule_overwrites_exactly_and_a_sum_does_not(seed, K, V, data):
    m = data.draw(st.integers(1, K))
    assert separation.constructed(K, V, K, m, "orthogonal", True, draw(seed)) < 1e-12
    assert separation.constructed(K, V, K, m, "orthogonal", False, draw(seed)) > 1e-3


@pytest.mark.parametrize("predict", ["decayed", "stored"])
def test_transition_matrices_give_the_state_of_the_recurrence(predict):
    tokens = started_tokens(2, 12, 5, 3, draw(0))
    A = transitions(tokens.k, kept(tokens), tokens.correct, predict)
    S = torch.zeros(2, 5, 3, dtype=F64)
    for t in range(12):
        S = A[:, t] @ S + tokens.k[:, t, :, None] * (tokens.write[:, t, None] * tokens.v[:, t])[:, None]
    torch.testing.assert_close(S, run(tokens, predict)[1], rtol=1e-12, atol=1e-12)


@SMALL
@given(seeds, st.integers(1, 6), st.sampled_from([("decayed", 2.0), ("stored", 1.0)]))
def test_no_step_is_above_its_bound(seed, K, rule):
    predict, top = rule
    generator = draw(seed)
    k, D = unit_keys(50, K, generator=generator), torch.rand(50, K, generator=generator, dtype=F64)
    e = top * torch.rand(50, generator=generator, dtype=F64)
    norms = torch.linalg.matrix_norm(transitions(k, D, e, predict), 2)
    assert (norms <= stability.step_bound(D, e, predict) + 1e-12).all()


def test_a_repeated_key_contracts_as_its_closed_form_says():
    # decayed: (1 - e) d; stored: d - e, whatever its sign.
    for d, e in ((0.9, 0.3), (0.2, 1.0), (0.0, 1.0)):
        k = torch.ones(1, 40, 1, dtype=F64)
        D, gate = torch.full_like(k, d), torch.full((1, 40), e, dtype=F64)
        for predict, ratio in (("decayed", (1 - e) * d), ("stored", abs(d - e))):
            rate = float(growth(transitions(k, D, gate, predict), draw(0)).exp())
            assert rate == pytest.approx(ratio, abs=1e-12)


def test_a_wholly_erased_state_survives_a_repeated_key_where_the_stored_state_is_read():
    tokens = stability.repeated_key(1, 9, 4, 2, erase=math.inf)
    assert stability.claimed_ratio(tokens) == 0
    assert float(stability.final_state(tokens, "decayed").norm()) == 0
    assert float(stability.final_state(tokens, "stored").norm()) == pytest.approx(math.sqrt(2))


@SMALL
@given(seeds, st.floats(0.1, 1.0), st.floats(0.0, 0.9))
def test_the_growth_of_a_diagonal_is_its_largest_channel(seed, most, share):
    D = torch.tensor([most, most * share, most * share * share], dtype=F64).expand(1, 60, 3)
    A = transitions(torch.zeros(1, 60, 3, dtype=F64), D, torch.zeros(1, 60, dtype=F64), "decayed")
    assert float(growth(A, draw(seed), skip=59).exp()) <= most + 1e-9
    if share < 0.5:
        assert float(growth(A, draw(seed), skip=59).exp()) == pytest.approx(most, rel=1e-6)


def test_a_correction_a_key_channel_can_make_a_state_grow_and_one_a_token_cannot():
    found = stability.search(Settings(size="small"), draw(0))
    best = {(x.correct, x.largest_e, x.predict): x.growth_a_token for x in found}
    assert best["channel", 1.0, "decayed"] > 1.01
    assert best["scalar", 2.0, "stored"] > 1.5
    for rule in (("scalar", 1.0, "decayed"), ("scalar", 2.0, "decayed"), ("scalar", 1.0, "stored")):
        assert best[rule] <= 1 + 1e-9


@pytest.mark.parametrize("predict", ["decayed", "stored"])
def test_with_token_gates_the_gradient_is_the_product_of_transitions(predict):
    tokens = started_tokens(1, 7, 3, 2, draw(1))
    product = torch.kron(gradient.products(tokens, predict)[0, -1], torch.eye(2, dtype=F64))
    torch.testing.assert_close(gradient.jacobian(tokens, predict), product, rtol=1e-10, atol=1e-12)


def test_a_content_gate_adds_a_path_and_a_silent_one_does_not():
    tokens = started_tokens(1, 12, 3, 2, draw(2))
    tokens = tokens._replace(erase_logits=tokens.erase_logits + 5)
    for strength, least, most in ((0.0, 0.0, 1e-12), (2.0, 1e-6, math.inf)):
        content = chunk.content_gate(3, 2, 2, strength, draw(3))._replace(chunk=3)
        fixed = frozen_gates(tokens, content, "stored", 1.0)
        product = torch.kron(gradient.products(fixed, "stored")[0, -1], torch.eye(2, dtype=F64))
        difference = float((gradient.jacobian(tokens, "stored", content) - product).norm())
        assert least <= difference <= most


def test_overwriting_every_key_leaves_no_gradient():
    products = gradient.products(gradient.overwritten_keys(5, 2), "decayed")
    assert float(products[0, -1].norm()) < 1e-15
    assert float(torch.linalg.matrix_norm(products[0, -2], 2)) == pytest.approx(1)


@SMALL
@given(seeds, st.integers(1, 5))
def test_gates_frozen_from_a_run_give_the_same_run(seed, L):
    tokens = started_tokens(2, 11, 3, 4, draw(seed))
    content = chunk.content_gate(3, 4, 2, 2.0, draw(seed + 1))._replace(chunk=L)
    fixed = frozen_gates(tokens, content, "stored", 1.0)
    torch.testing.assert_close(run(fixed, "stored")[0], run(tokens, "stored", content)[0], rtol=1e-10, atol=1e-12)


def test_a_gate_renewed_every_token_is_not_stale_and_a_chunk_past_the_end_is_no_gate():
    tokens = started_tokens(1, 20, 3, 3, draw(4))
    content = chunk.content_gate(3, 3, 2, 3.0, draw(5))
    found = dict(zip((chunk.OFF, 1, 4, 21), chunk.staleness(tokens, content, (chunk.OFF, 1, 4, 21)), strict=True))
    assert found[1] == (0, 0)
    assert found[4][0] > 0
    assert found[21] == pytest.approx(found[chunk.OFF])


@SMALL
@given(st.floats(0.01, 10), st.floats(1e-4, 1), st.floats(0.05, 2))
def test_the_fitted_length_is_the_minimum_of_what_it_balances(overhead, level, exponent):
    def cost(L):
        return overhead / L + level * L**exponent

    best = chunk.best_length(overhead, level, exponent)
    assert cost(best) <= min(cost(best * 1.01), cost(best / 1.01))
    lengths = (2, 4, 8, 16)
    assert chunk.fit_power(lengths, [level * L**exponent for L in lengths]) == pytest.approx((level, exponent))
    a, b = chunk.fit_time([chunk.Timing(L, 3 + overhead / L) for L in lengths])
    assert (a, b) == pytest.approx((3, overhead), rel=1e-6)


def test_staleness_that_does_not_grow_has_no_best_length():
    assert chunk.best_length(1.0, 0.002, 0.0) == math.inf


def mask_of(kind: str, T: int, V: int, seed: int):
    mask = torch.randn(1, T, V, generator=draw(seed), dtype=F64)
    return mask[..., :1].expand(-1, -1, V) if kind == "alike" else mask


@SMALL
@given(seeds, st.integers(1, 20), st.integers(1, 7))
def test_chunks_with_a_solve_a_value_channel_equal_the_token_loop(seed, T, C):
    tokens, mask = started_tokens(1, T, 4, 3, draw(seed)), mask_of("each", T, 3, seed)
    torch.testing.assert_close(
        boundary.in_chunks(tokens, mask, C), boundary.by_token(tokens, mask)[0], rtol=1e-10, atol=1e-12
    )


@SMALL
@given(seeds, st.integers(2, 16))
def test_a_shared_solve_is_exact_where_the_mask_is_one_number_and_only_there(seed, T):
    tokens = started_tokens(1, T + 2, 4, 3, draw(seed))
    for kind, exact in (("alike", True), ("each", False)):
        mask = mask_of(kind, T + 2, 3, seed)
        got, truth = boundary.in_chunks(tokens, mask, T + 2, shared=True), boundary.by_token(tokens, mask)[0]
        assert (float((got - truth).norm() / truth.norm()) < 1e-10) is exact


def test_a_mask_of_one_number_is_a_key_axis_erase():
    tokens, mask = started_tokens(1, 9, 4, 3, draw(6)), mask_of("alike", 9, 3, 6)
    key_axis = tokens._replace(log_decay=tokens.log_decay + F.logsigmoid(-mask[..., :1]))
    for predict in ("decayed", "stored"):
        got, state = boundary.by_token(tokens, mask, predict)
        o, S = run(key_axis, predict)
        torch.testing.assert_close(got, o, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state, S, rtol=1e-10, atol=1e-12)


def test_without_a_correction_a_value_axis_erase_needs_no_system():
    tokens, mask = started_tokens(1, 9, 4, 3, draw(7)), mask_of("each", 9, 3, 7)
    truth, _ = boundary.by_token(tokens._replace(correct=None), mask)
    torch.testing.assert_close(boundary.without_correction(tokens, mask), truth, rtol=1e-10, atol=1e-12)


@SMALL
@given(seeds, st.integers(1, 6), st.data())
def test_queries_ask_for_the_latest_value_of_their_key(seed, pairs, data):
    m = data.draw(st.integers(0, pairs))
    task = Overwrite(
        pairs=pairs, overwrites=m, queries=5, keys=8, values=6, skew=data.draw(st.sampled_from([0.0, 2.0]))
    )
    batch, changed = task.sample(4, draw(seed))
    assert batch.ids.shape == (4, task.length)
    assert int(batch.ids.max()) < task.vocab_size
    for row, labels, flags in zip(batch.ids.tolist(), batch.labels.tolist(), changed.tolist(), strict=True):
        memory, written = {}, []
        for token, label in zip(row, labels, strict=True):
            kind, key, value = token // (8 * 6), token // 6 % 8, token % 6
            if kind == QUERY:
                assert memory[key] == label
                assert (written.count(key) > 1) is flags.pop(0)
            else:
                memory[key] = value
                written.append(key)


def test_rounds_are_drawn_one_after_another_and_ask_for_their_own_pairs():
    once = Overwrite(pairs=4, overwrites=2, queries=4, keys=8, values=4)
    thrice = Overwrite(pairs=4, overwrites=2, queries=4, keys=8, values=4, rounds=3)
    generator, batch = draw(3), thrice.batch(0, 5, draw(3))
    for part in range(3):
        ids, labels = once.batch(0, 5, generator)
        cut = slice(part * once.length, (part + 1) * once.length)
        assert torch.equal(batch.ids[:, cut], ids)
        assert torch.equal(batch.labels[:, cut], labels)
    assert thrice.length == 3 * once.length == batch.ids.shape[1]


def test_a_perfect_solver_of_overwrite_scores_one_and_guessing_scores_chance():
    task = Overwrite(pairs=4, overwrites=2, queries=4, keys=8, values=4, examples=400)

    class Solver(torch.nn.Module):
        def __init__(self, knows):
            super().__init__()
            self.knows = knows

        def forward(self, ids):
            logits = torch.rand(*ids.shape, task.values, generator=draw(0))
            if self.knows:
                for row, tokens in enumerate(ids.tolist()):
                    memory = {}
                    for t, token in enumerate(tokens):
                        key = token // task.values % task.keys
                        if token // (task.keys * task.values) == QUERY:
                            logits[row, t, memory[key]] = 2
                        else:
                            memory[key] = token % task.values
            return type("Output", (), {"logits": logits})

    assert set(task.evaluate(Solver(True), torch.device("cpu")).values()) == {1.0}
    assert task.evaluate(Solver(False), torch.device("cpu"))["accuracy"] == pytest.approx(1 / task.values, abs=0.06)


def test_what_is_recorded_from_a_mixer_is_what_it_ran():
    torch.manual_seed(0)
    model: OneMixer = build("carve", FITS)
    torch.nn.init.normal_(model.mixer.gates.content_up, 0, 2)
    tokens, content = recorded(model, 2, 3)
    assert isinstance(content, ContentGate)
    seen = []
    handle = model.mixer.o_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(FITS.sample(2, draw(3))[0].ids)
    handle.remove()
    o, _ = run(tokens, "stored", content, scale=tokens.k.shape[-1] ** -0.5)
    torch.testing.assert_close(o.float(), seen[0][:, :, 0], rtol=1e-3, atol=1e-5)


def test_gates_are_recorded_only_where_they_mean_what_they_say():
    with pytest.raises(TypeError, match="DeltaMixer"):
        recorded(build("gdn2", FITS), 1, 0)


def test_models_that_are_compared_have_equal_parameters():
    counts = [count(train_one(mixer, FITS, 1, 0, separation.CONTENT).model) for mixer in separation.GATES.values()]
    assert max(counts) - min(counts) <= 0.01 * max(counts)


def test_stacks_on_the_task_overwrite_have_equal_parameters_and_its_three_scores(monkeypatch):
    monkeypatch.setitem(stacks.PAIRS, "examples", 8)
    sizes = []
    for mixer in separation.GATES.values():
        size, scores, loss = stacks.train_stack(mixer, separation.CONTENT, 1, 0)
        sizes.append(size)
        assert {"accuracy", "overwritten", "intact"} <= set(scores)
        assert math.isfinite(loss)
    assert max(sizes) - min(sizes) <= 0.02 * max(sizes)


def test_the_same_seed_trains_the_same_model():
    first = train_one.__wrapped__("carve", FITS, 2, 5)
    again = train_one.__wrapped__("carve", FITS, 2, 5)
    assert first.scores == again.scores
    assert Tokens(*recorded(first.model, 1, 0)[0]).k.equal(recorded(again.model, 1, 0)[0].k)


def test_no_best_length_is_told_of_one_draw():
    timings = [chunk.Timing(L, 1 + 8 / L) for L in (16, 32, 64)]
    stale = {("drawn", L): [(0.01 * L, 0.0), (0.02 * L, 0.0)] for L in (16, 32, 64)}
    stale |= {("trained", L): [(0.01 * L, 0.0)] for L in (16, 32, 64)}
    fits = [chunk._fit(name, stale, timings) for name in ("drawn", "trained")]
    assert fits[0].low is not None
    assert fits[0].low < fits[0].best_L < fits[0].high
    assert (fits[1].low, fits[1].high) == (None, None)
    assert "trained: not told, of one draw" in chunk._best(fits).measured


def test_a_call_is_timed_by_the_median_and_the_first_calls_do_not_count(monkeypatch):
    clock, calls = [0.0], []
    takes = iter((100.0, 50.0, 3.0, 1.0, 2.0))

    def call():
        calls.append(None)
        clock[0] += next(takes)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert median_seconds(call, torch.device("cpu"), repeats=3, warm=2) == 2.0
    assert len(calls) == 5


def test_what_would_be_timed_on_a_gpu_runs_here_in_pytorch_operations():
    small, here = Settings(size="small"), torch.device("cpu")
    rows = chunk.time_on(here, small, torch.float32)
    assert [(row.L, row.backend, row.dtype) for row in rows] == [(L, "torch", "float32") for L in (0, 16, 32)]
    times = boundary.time_on(here, small, torch.float32)
    assert [row.form for row in times] == [
        "key-axis, chunkwise (torch)",
        boundary.KEY_LOOP,
        boundary.LOOP,
        boundary.MANY,
    ]
    assert times[0].slowdown == 1
    assert all(row.seconds > 0 for row in (*rows, *times))


def gpu_times(**seconds: float):
    names = {"fused": "key-axis, chunkwise (triton)", "key": boundary.KEY_LOOP, "loop": boundary.LOOP}
    names["many"] = boundary.MANY
    return [boundary.Timing(64, names[n], s, s / seconds["fused"], "cuda") for n, s in seconds.items()]


@pytest.mark.parametrize(
    ("loop", "many", "verdict"),
    [
        (100.0, 10.0, "does not hold as printed"),  # an exact form that is not serial
        (100.0, 90.0, "holds"),
        (1.5, 1.4, "cannot be told"),
    ],
)
def test_a_gpu_s_times_decide_whether_throughput_collapses(loop, many, verdict):
    rows = gpu_times(fused=1.0, key=loop, loop=loop, many=many)
    said = boundary._throughput(rows, "some GPU", "on this CPU")
    assert said.verdict == verdict
    assert "some GPU" in said.measured
    assert "on this CPU" in said.measured
    assert boundary._throughput([], "cpu", "on this CPU").verdict == "cannot be told"


def test_a_gpu_s_times_decide_whether_a_longer_chunk_saves_time():
    def timed(*seconds):
        rows = zip((0, 16, 64), seconds, strict=True)
        return [chunk.Timing(L, s, "cuda", b, "bfloat16") for b in ("triton", "torch") for L, s in rows]

    assert chunk._saves(timed(1.0, 4.0, 2.0), "some GPU").verdict == "holds"
    assert chunk._saves(timed(1.0, 2.0, 2.0), "some GPU").verdict == "does not hold as printed"
    assert "triton" in chunk._saves(timed(1.0, 4.0, 2.0), "some GPU").measured
    assert chunk._saves([], "cpu").verdict == "cannot be told"


def test_models_of_all_lengths_start_from_the_same_weights_and_without_a_gate_nothing_is_read():
    task = Overwrite(pairs=4, overwrites=2, queries=4, keys=8, values=4, rounds=4)
    ids = task.batch(0, 2, draw(0)).ids
    for start, opened in (("shut", False), ("open", True)):
        outputs = {}
        for L in (lengths.OFF, 1, 16):
            torch.manual_seed(0)
            model = build(lengths.MIXER, task, form=lengths.form_at(start, L, task))
            assert bool(content_up(model).any()) is opened
            outputs[L] = model(ids).logits
            if L == lengths.OFF:
                torch.nn.init.zeros_(content_up(model))
                assert torch.equal(model(ids).logits, outputs[L])
        same = float((outputs[1] - outputs[16]).detach().norm() / outputs[16].detach().norm()) < 1e-5
        assert same is not opened


def curve_of(*rows):
    return dict(zip((lengths.OFF, 1, 16, 32, 64, 128), rows, strict=True))


def judged(scores):
    return lengths.flat_statement(scores, "shut", 16, 128, 0.0036, 4)


def test_trained_lengths_are_flat_only_where_every_interval_lies_within_the_margin():
    base = [0.90, 0.92, 0.91]
    near = [[x + d for x in base] for d in (0.0001, 0.0002, -0.0001, 0.0003)]
    assert judged(curve_of(base, base, *near)).verdict == "holds"
    wide = [[0.80, 0.99, 0.95], *near[1:]]
    assert judged(curve_of(base, base, *wide)).verdict == "cannot be told"
    worse = [*near[:3], [x - 0.1 for x in base]]
    said = judged(curve_of(base, base, *worse))
    assert said.verdict == "does not hold as printed"
    assert "L = 128: -10.99 %" in said.measured
    assert judged(curve_of(*[[0.5]] * 6)).verdict == "cannot be told"


def test_the_best_trained_length_is_told_only_between_lengths_that_are_told_from_it():
    def curve(*levels, off=0.1):
        return curve_of([off] * 3, *[[level - 0.001, level, level + 0.001] for level in levels])

    def found(*levels):
        return lengths.fit_length(curve(*levels))

    risen = (0.5, 0.7, 0.9, 0.7, 0.5)
    inside = found(*risen)
    assert inside.verdict == "inside"
    assert "L* = 32" in lengths.best_in_words(inside)
    assert "flat: cannot be told (no length" in lengths.best_in_words(found(0.5, 0.5, 0.5, 0.5, 0.5))
    edge = found(0.5, 0.6, 0.7, 0.8, 0.9)
    assert "L = 128" in lengths.best_in_words(edge)
    assert "beyond it nothing was measured" in lengths.best_in_words(edge)
    curves = {"shut": curve(*risen), "open": curve(0.5, 0.6, 0.7, 0.8, 0.9)}
    assert lengths.best_statement({"shut": inside}, curves).verdict == "holds"
    assert lengths.best_statement({"shut": inside, "open": edge}, curves).verdict == "cannot be told"
    as_good = lengths.best_statement({"shut": inside}, {"shut": curve(*risen, off=0.9)})
    assert as_good.verdict == "cannot be told"
    assert "L = 32 against no content gate at all: +0.00 %" in as_good.measured


def test_models_are_trained_at_every_length_and_scored_without_their_readout():
    small = Settings(size="small", device="cpu")
    found = lengths.curves(small, 16, 128, 0.0036)
    rows = found.tables["trained"].rows
    assert [row.L for row in rows if row.gate_starts == "open"] == [lengths.OFF, *lengths.lengths_of(small)]
    assert {row.device for row in rows} == {"cpu"}
    assert all((row.without_readout is None) is (row.L == lengths.OFF) for row in rows)
    assert len({row.parameters for row in rows}) == 1
    assert {statement.verdict for statement in found.statements} == {"cannot be told"}  # of one seed
    drawn = {x for line in found.panel.lines for x in line.x}
    assert {lengths.OFF_AT, 1, 16} <= drawn


def test_a_step_is_captured_only_on_a_gpu_and_only_where_the_fused_kernels_take_it():
    assert not captures(Form(head=16, chunk=16), torch.device("cpu"))
    assert not captures(Form(head=16, chunk=16, backend="reference"), torch.device("cuda"))
