"""Loading specs: inheritance, overrides, and errors that say where they stand."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridzoo.architectures import Spec, list_specs, load_spec, spec_path
from hybridzoo.mixers import SpecError

BASE = """
    d_model: 32
    vocab_size: 16
    mixer_defaults: {conv_size: 4}
    mixers:
      c: {type: carve, n_heads: 2, head_dim: 16, erase: token}
      a: {type: attention, n_heads: 2, window: 8}
    layers: "(c*3 a)*2"
    ffn: {type: swiglu, expand: 2.0}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str = BASE) -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(textwrap.dedent(text))
        return name

    return write


def refusal(path: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides or [])
    return str(caught.value)


def test_a_file_becomes_resolved_layers(write) -> None:
    spec = load_spec(write("x.yaml"))
    assert spec.name == "x"
    assert [layer.label for layer in spec.layers] == ["c", "c", "c", "a"] * 2
    carve, attention = spec.mixers["c"], spec.mixers["a"]
    assert (carve.d_model, carve.erase, carve.head_dim, carve.conv_size) == (32, "token", 16, 4)
    assert (attention.window, attention.conv_size) == (8, 4)
    assert spec.layers[0].mixers == (("c", carve),)
    assert spec.layers[0].ffn == spec.ffn


def test_ffn_none_leaves_layers_without_one(write) -> None:
    assert load_spec(write("x.yaml"), ["ffn=none"]).layers[0].ffn is None


def test_registry_names_with_flags_stand_in_a_pattern(write) -> None:
    spec = load_spec(
        write("x.yaml"), ["layers=carve[erase=none,n_heads=4] c[erase=content] c", "mixer_defaults.head_dim=8"]
    )
    configs = [layer.mixers[0][1] for layer in spec.layers]
    assert [(c.erase, c.n_heads, c.head_dim) for c in configs] == [("none", 4, 8), ("content", 2, 16), ("token", 2, 16)]


def test_words_win_over_flags_and_flags_over_defaults(write) -> None:
    text = """
        d_model: 32
        vocab_size: 16
        mixer_defaults: {erase: none, write: one, n_heads: 2, correct: none}
        mixers:
          c: {type: "carve[erase=token,write=scalar]", erase: content}
        layers: c
    """
    config = load_spec(write("x.yaml", text)).mixers["c"]
    assert (config.erase, config.write, config.correct) == ("content", "scalar", "none")


def test_a_base_is_inherited_and_overridden_mapping_by_mapping(write) -> None:
    write("base.yaml")
    write("deep/mid.yaml", "base: ../base.yaml\nmixers: {a: {window: 4}}\nname: middle")
    spec = load_spec(write("top.yaml", "base: deep/mid.yaml\nlayers: c a\nffn: {expand: 3.0}"))
    assert (spec.name, spec.d_model, len(spec.layers)) == ("top", 32, 2)
    assert (spec.mixers["a"].window, spec.mixers["a"].n_heads) == (4, 2)
    assert (spec.ffn.type, spec.ffn.expand) == ("swiglu", 3.0)


def test_a_new_type_replaces_the_whole_entry_and_the_same_type_does_not(write) -> None:
    write("base.yaml")
    top = write(
        "top.yaml", "base: base.yaml\nmixers: {c: {type: attention, n_heads: 4}, a: {type: attention, window: 3}}"
    )
    spec = load_spec(top)
    assert spec.mixers["c"] == load_spec("base.yaml", ["mixers.c={type: attention, n_heads: 4}"]).mixers["c"]
    assert (spec.mixers["c"].n_heads, spec.mixers["c"].head_dim) == (4, None)
    assert (spec.mixers["a"].n_heads, spec.mixers["a"].window) == (2, 3)


def test_overrides_are_one_file_on_top_so_their_order_does_not_matter(write) -> None:
    path = write("x.yaml")
    overrides = ["mixers.c.n_heads=4", "mixers.c.type=attention", "layers=c", "d_model=64", "ffn.width=null"]
    assert load_spec(path, overrides) == load_spec(path, overrides[::-1])
    assert load_spec(path, ["d_model=64", "d_model=48"]).d_model == 48
    assert load_spec(path, ["mixers.c=attention[n_heads=8]", "mixers.c.window=5"]).mixers["c"].window == 5


def test_interpolation_reaches_across_base_and_overrides(write) -> None:
    write(
        "base.yaml",
        BASE.replace("window: 8", 'window: "${max_context}"').replace(
            "d_model: 32", "d_model: 32\n    max_context: 64"
        ),
    )
    spec = load_spec(write("top.yaml", "base: base.yaml\nmax_context: 128"), ["mixers.a.n_heads=${mixers.c.n_heads}"])
    assert (spec.mixers["a"].window, spec.mixers["a"].n_heads) == (128, 2)


@settings(max_examples=30)
@given(
    st.sampled_from(["swiglu", "gelu", "none"]),
    st.integers(1, 4),
    st.sampled_from(["c+a c*2", "(c a)*3", "carve[n_heads=2]"]),
)
def test_a_resolved_spec_saves_and_loads_as_itself(ffn: str, heads: int, layers: str) -> None:
    data = yaml.safe_load(textwrap.dedent(BASE))
    data |= {"name": "x", "layers": layers, "ffn": {"type": ffn}, "d_model": 32 * heads}
    spec = Spec.from_dict(data)
    assert Spec.from_dict(spec.to_dict()) == spec
    assert Spec.from_dict(yaml.safe_load(spec.to_yaml())) == spec


def test_a_saved_spec_is_a_file_that_loads(write) -> None:
    spec = load_spec(write("x.yaml"), ["layers=c carve[n_heads=4,erase=none] c[erase=content]*2"])
    assert load_spec(write("saved.yaml", spec.to_yaml())) == spec


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("d_modl=64", "unknown key 'd_modl' (did you mean 'd_model'?); known: "),
        ("d_modl=64", "(did you mean 'd_model'?)"),
        ("Layers=c", "unknown key 'Layers'"),
        (f"d_model={'9' * 5000}", "d_model: expected integer, got"),
        ("d_model=wide", "d_model: expected integer, got 'wide'"),
        ("d_model=0", "d_model: must be at least 1, got 0"),
        ("d_model.x=1", "d_model: expected integer, got {'x': 1}"),
        ("d_model=10000000000", "d_model: must be at most 1,048,576, got 10000000000"),
        ("vocab_size=-3", "vocab_size: must be at least 1, got -3"),
        ("norm=layernorm", "norm: 'layernorm' is not one of rmsnorm (did you mean 'rmsnorm'?)"),
        ("norm_eps=0", "norm_eps: must be above 0"),
        ("init.head_std=1", "init.head_std: the head is the embedding; a head of its own needs tie_embeddings: false"),
        ("init.std=-1", "init.std: must be above 0"),
        ("init.sdt=1", "init: unknown key 'sdt' (did you mean 'std'?); known: std, residual_scale, head_std"),
        ("ffn.type=swigl", "ffn.type: 'swigl' is not one of swiglu, gelu, relu2, none (did you mean 'swiglu'?)"),
        ("tie_embeddings=yes", "tie_embeddings: expected true or false, got 'yes'"),
        ("mixers.c.erase=tokn", "mixers.c.erase: 'tokn' is not one of none, token, content (did you mean 'token'?)"),
        ("mixers.c.n_head=4", "mixers.c: unknown key 'n_head'"),
        ("mixers.a.erase=token", "mixers.a.erase: 'attention' has no gate 'erase'"),
        ("mixers.c.n_head=4", "(did you mean 'n_heads'?)"),
        ("mixers.c.type=crave", "mixers.c.type: unknown mixer 'crave'"),
        ("mixers.c.type=crave", "(did you mean 'carve'?)"),
        ("mixers.c.type=[a]", "mixers.c.type: expected the name of a mixer, got ['a']"),
        ("mixers.c.d_model=8", "mixers.c.d_model: every mixer has the spec's own d_model"),
        ("mixers.a.n_heads=5", "mixers.a.n_heads: 5 does not divide d_model 32"),
        ("mixers.d.n_heads=5", "mixers.d: no type, such as {type: carve, n_heads: 4}; declared: c, a"),
        ("mixers.c.type=CARVE", "(did you mean 'carve'?)"),
        (
            "mixers.kda.n_heads=2",
            "mixers.kda: no type, such as {type: carve, n_heads: 4}; for the mixer of that name, {",
        ),
        ("mixers=3", "mixers: expected names with their mixers, as in {c: {type: carve, n_heads: 4}}, got 3"),
        ("mixers=null", "mixers: expected names with their mixers, as in {c: {type: carve, n_heads: 4}}, got nothing"),
        ("ffn=null", "ffn: expected a mapping of keys to values, got null"),
        ("mixers.c=3", "mixers.c: expected a mixer, as in {type: carve, n_heads: 4}, got 3"),
        ("mixers.c=null", "mixers.c: expected a mixer, as in {type: carve, n_heads: 4}, got nothing"),
        ("mixers={c 1: kda}", "mixers: 'c 1' cannot stand in a pattern: a name is letters, digits"),
        (
            "layers=c[type=kda]",
            "layers: c[type=kda]: flags change words of a mixer, not which it is; name 'kda' itself",
        ),
        ("layers=[c, a]", "layers: expected a pattern, as in \"(c*3 a)*2\", got ['c', 'a']"),
        ("mixer_defaults.n_haeds=4", "mixer_defaults: unknown word 'n_haeds'"),
        ("mixer_defaults.n_haeds=4", "(did you mean 'n_heads'?)"),
        ("mixer_defaults.conv_size=big", "mixer_defaults.conv_size: expected integer, got 'big' (for mixer 'c')"),
        ("layers=(c*3 b)*2", "layers: column 6: unknown mixer 'b'"),
        ("layers=3", 'layers: expected a pattern, as in "(c*3 a)*2", got 3'),
        ("layers=carve[erase=tokn,n_heads=2]", "layers: carve[erase=tokn,n_heads=2].erase: 'tokn' is not one of"),
        (
            "layers=carve",
            "layers: carve: missing n_heads; give it here, as in carve[n_heads=...], under mixer_defaults, or under",
        ),
        ("layers=carve[num_heads=4]", "layers: carve[num_heads=4]: unknown key 'num_heads' (did you mean 'n_heads'?)"),
        ("layers=carve[d_model=4]", "d_model: every mixer has the spec's own d_model; leave it out"),
        ("layers=(c*64)*65", "layers: column 8: the pattern expands past 4,096 layers here"),
        ("name=${oc.env:HOME}", "name: '${oc.env:HOME}': resolvers never run"),
        ("max_context=0", "max_context: must be at least 1, got 0"),
    ],
)
def test_a_bad_override_is_named_with_what_would_be_right(write, override: str, says: str) -> None:
    message = refusal(write("x.yaml"), [override])
    assert message.startswith(f"override '{override}': " if len(override) <= 60 else "override '")
    assert len(message) < 1000
    assert says in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("d_model", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        ("d_model=", "no value; to unset a key give null"),
        ("d_model=[1", "line 1, column 3: expected ',' or ']'"),
        ("base=carve-tiny", "base is part of a file"),
    ],
)
def test_what_is_no_override_is_refused(write, override: str, says: str) -> None:
    message = refusal(write("x.yaml"), [override])
    assert message.startswith(f"override '{override}': {says}")


def test_overrides_given_as_one_text_are_refused(write) -> None:
    with pytest.raises(SpecError, match="expected a list of 'key=value'"):
        load_spec(write("x.yaml"), "d_model=3")
    with pytest.raises(SpecError, match="expected a list of 'key=value', got 3 in it"):
        load_spec(write("x.yaml"), ["d_model=3", 3])


def test_an_error_names_the_file_in_which_the_key_stands(write) -> None:
    write("base.yaml", BASE.replace("erase: token", "erase: tokn"))
    top = write("sub/top.yaml", "base: ../base.yaml\nmixers: {a: {windw: 3}}")
    assert refusal(top).startswith("base.yaml: mixers.c.erase: 'tokn' is not one of none, token, content")
    assert refusal(top, ["mixers.c.erase=none"]).startswith("sub/top.yaml: mixers.a: unknown key 'windw'")


def test_a_width_that_does_not_fit_says_where_it_comes_from(write) -> None:
    path = write("x.yaml")
    message = refusal(path, ["d_model=31"])
    assert message == (
        "x.yaml: mixers.a.n_heads: 2 does not divide d_model 31, and head_dim is not set "
        "(d_model from override 'd_model=31')"
    )
    assert "(d_model from" not in refusal(write("y.yaml", BASE.replace("d_model: 32", "d_model: 31")))


def test_a_spec_without_layers_or_sizes_is_refused(write) -> None:
    assert "x.yaml: layers: missing" in refusal(write("x.yaml", "d_model: 8"))
    assert "x.yaml: unknown key 'n_layers'" in refusal(write("x.yaml", "d_model: 8\nn_layers: 3"))
    assert "x.yaml: missing 'd_model' and 'vocab_size'" in refusal(write("x.yaml", "layers: a"))
    assert "x.yaml: layers: column 1: no layers" in refusal(write("x.yaml", BASE.replace("(c*3 a)*2", "")))


def test_a_missing_spec_lists_those_that_are_shipped_and_the_nearest() -> None:
    message = refusal("carv-hybrid-tiny")
    assert message.startswith("no spec 'carv-hybrid-tiny' (did you mean 'carve-hybrid-tiny'?); shipped: ")
    assert all(name in message for name in list_specs())


def test_a_missing_file_is_refused_with_the_nearest_shipped_name(tmp_path: Path) -> None:
    assert "carv-tiny.yaml: no such file (did you mean 'carve-tiny'?)" in refusal(str(tmp_path / "carv-tiny.yaml"))
    assert "the path of a spec ends in .yaml" in refusal(str(tmp_path / "spec.txt"))


def test_a_base_that_leads_nowhere_or_in_a_circle_is_refused(write) -> None:
    assert refusal(write("x.yaml", "base: carv-tiny")).startswith(
        "x.yaml: base: no spec 'carv-tiny' (did you mean 'carve-tiny'?)"
    )
    assert refusal(write("x.yaml", "base: y.yaml")) == "x.yaml: base: no such file 'y.yaml' beside x.yaml"
    assert refusal(write("x.yaml", "base: kda-tiny.yaml")).endswith("beside x.yaml (did you mean 'kda-tiny'?)")
    assert refusal(write("sub/y.yaml", "base: z")).startswith("sub/y.yaml: base: no spec 'z'; shipped: ")
    write("sub/z.yaml")
    says = "no spec 'z' is shipped; the file of that name is 'z.yaml'"
    assert refusal("sub/y.yaml") == f"sub/y.yaml: base: {says}"
    assert refusal("x") == says.replace("z", "x")
    assert refusal(write("x.yaml", "base: 3")).startswith("x.yaml: base: expected the name of a shipped spec or a path")
    write("y.yaml", "base: z.yaml")
    write("z.yaml", "base: x.yaml")
    assert "a spec cannot be based on itself: x.yaml -> y.yaml -> z.yaml -> x.yaml" in refusal(
        write("x.yaml", "base: y.yaml")
    )


def test_a_study_is_no_spec_and_is_said_to_be_one(write) -> None:
    study = write("study.yaml", "about: two stacks\nspec: carve-tiny\ntasks: {text: {type: bytes}}")
    assert refusal(study) == "'study.yaml' is a study, which has several stacks: use `hybridzoo study run study.yaml`"
    assert "'quickstart' is a study" in refusal("quickstart")
    assert "x.yaml: base: 'quickstart' is a study" in refusal(write("x.yaml", "base: quickstart"))
    assert "x.yaml: unknown key 'tasks'" in refusal(write("x.yaml", f"{BASE}    tasks: {{}}\n"))  # a slip in a spec


def test_bases_that_go_on_for_ever_are_refused(write) -> None:
    for i in range(2000):
        write(f"x{i}.yaml", f"base: x{i + 1}.yaml")
    assert refusal("x0.yaml").startswith("x17.yaml: base: more than 16 files based on one another")


def test_the_most_layers_load_in_no_time(write) -> None:
    start = time.perf_counter()
    assert len(load_spec(write("x.yaml"), ["layers=c*4096"]).layers) == 4096
    assert time.perf_counter() - start < 2


def test_what_the_yaml_reader_refuses_is_refused_with_the_file(write) -> None:
    assert refusal(write("x.yaml", "d_model: 8\nd_model: 9")).startswith("x.yaml: line 2, column 1: the key 'd_model'")


def test_spec_path_is_the_file_of_a_shipped_spec() -> None:
    assert spec_path("carve-tiny").is_file()


def test_a_mapping_is_pointed_to_what_reads_it():
    with pytest.raises(
        TypeError, match=r"expected a spec's name or path, got dict; Spec.from_dict\(...\) reads a mapping"
    ):
        load_spec({"name": "x"})
