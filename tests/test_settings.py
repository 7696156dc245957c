import itertools
import re
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modules import app
from modules.errors import SettingsError
from modules.options import Options, knob
from modules.samplers import SamplingParams
from modules.settings import ChatOptions, Configuration, Settings, Text, load, parse_flags, parse_yaml, parser, saved

GROUPS = (SamplingParams, ChatOptions)
GOLDEN = Path(__file__).parent / "golden" / "help.txt"


def flags(*words: str) -> Configuration:
    return load(words, (), (), GROUPS)


def refused(argv=(), flag_texts=(), yaml_texts=()) -> str:
    with pytest.raises(SettingsError) as error:
        load(argv, [Text("CMD_FLAGS.txt", t) for t in flag_texts], [Text("settings.yaml", t) for t in yaml_texts], GROUPS)
    return str(error.value)


# --- precedence ---------------------------------------------------------------------------------------------------------------------

LEVELS = ("top yaml", "user yaml", "top flags", "user flags", "argv")


@pytest.mark.parametrize("given_levels", [c for n in range(6) for c in itertools.combinations(range(5), n)], ids=str)
def test_the_last_level_that_says_something_wins(given_levels):
    value = {level: 1000 + level for level in given_levels}
    yamls = [Text(LEVELS[i], f"listen_port: {value[i]}" if i in value else "") for i in (0, 1)]
    flag_texts = [Text(LEVELS[i], f"--listen-port {value[i]}" if i in value else "") for i in (2, 3)]
    argv = ["--listen-port", str(value[4])] if 4 in value else []
    found = load(argv, flag_texts, yamls, GROUPS)
    assert found.settings.listen_port == (value[max(value)] if value else 0)
    assert ("listen_port" in found.explicit) == bool(value.keys() & {2, 3, 4})


def test_levels_are_joined_key_by_key():
    found = load(["--top-k", "5"], [Text("f", "--verbose")], [Text("y", "temperature: 0.5\nlisten: true")], GROUPS)
    assert found.settings.verbose and found.settings.listen
    assert (found.group(SamplingParams).top_k, found.group(SamplingParams).temperature) == (5, 0.5)
    assert found.group(ChatOptions) == ChatOptions()
    assert found.explicit == {"verbose", "top_k"}


# --- command line -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--listen-port", "1"], ["--listen_port", "1"], ["--listen_port=1"], ["--listen-port=1"]])
def test_hyphens_and_underscores_are_the_same(words):
    assert flags(*words).settings.listen_port == 1


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--seed=-1"]])
def test_negative_numbers(words):
    assert flags(*words).group(SamplingParams).seed == -1
    assert flags("--frequency-penalty", "-0.5").group(SamplingParams).frequency_penalty == -0.5


def test_values_with_equals_signs_spaces_underscores_and_hyphens():
    found = flags("--gradio-auth=my_name:a=b --c", "--model", "My_Model v2=x.gguf", "--custom-stopping-strings", '"--x_y"')
    assert found.settings.gradio_auth == "my_name:a=b --c"
    assert found.settings.model == "My_Model v2=x.gguf"
    assert found.group(SamplingParams).stopping_strings == ("--x_y",)


def test_switches_and_lists():
    assert flags("--listen").settings.listen and not flags("--listen", "--no-listen").settings.listen
    assert not flags("--no-enable-thinking").group(ChatOptions).enable_thinking
    assert flags("--lora", "a", "b", "--model", "m").settings.lora == ("a", "b")
    assert flags("--sampler-priority", "top_k,top_p").group(SamplingParams).sampler_priority == ("top_k", "top_p")
    assert flags("--sampler-priority", "top_k", "top_p").group(SamplingParams).sampler_priority == ("top_k", "top_p")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--listn"], "command line: unknown flag or value '--listn'. Did you mean --listen?"),
        (["--listen_prot", "1"], "Did you mean --listen-port?"),
        (["--temprature=1"], "Did you mean --temperature?"),
        (["--zzzzzzzz"], "command line: unknown flag or value '--zzzzzzzz'. See --help."),
        (["model.gguf"], "unknown flag or value 'model.gguf'. See --help."),
        (["--temp", "1"], "unknown flag or value '--temp'"),
        (["--listen-port"], "command line: Argument --listen-port: expected one argument. See --help."),
        (["--listen-port", "http"], "command line: listen_port cannot be 'http'. Use a whole number of at least 0 and of at most 65535."),
        (["--listen-port", "65536"], "listen_port cannot be '65536'"),
        (["--temperature", "nan"], "temperature cannot be"),
        (["--temperature=inf"], "temperature cannot be inf"),
        (["--dark-theme", "blue"], "dark_theme cannot be 'blue'. Use one of: auto, on, off."),
        (["--custom-system-message", "x"], "unknown flag"),
        (["--listen=yes"], "ignored explicit argument 'yes'"),
    ],
)
def test_a_wrong_flag_is_an_error_with_the_fix(words, message):
    assert message in refused(words)


def test_flags_kept_from_the_earlier_system_warn():
    found = flags("--public-api", "--extensions", "x")
    assert found.warnings == (
        "--public-api is not in this version yet and has no effect.",
        "--extensions is not in this version yet and has no effect.",
    )
    assert load((), (), [Text("s", "public_api: true")], GROUPS).warnings == found.warnings[:1]
    assert flags("--verbose").warnings == ()


# --- CMD_FLAGS.txt ------------------------------------------------------------------------------------------------------------------


def words_of(text: str):
    return load((), [Text("CMD_FLAGS.txt", text)], (), GROUPS)


def test_comments_blank_lines_quotes_and_continuations():
    found = words_of('# --listen\n\n  # --share\n--verbose \\\n--model "big disk/my model.gguf"\n--listen-port=7 --no-api\n')
    assert not found.settings.listen and not found.settings.share
    assert (found.settings.verbose, found.settings.model, found.settings.listen_port) == (True, "big disk/my model.gguf", 7)


def test_windows_paths_and_byte_order_mark():
    found = words_of('\ufeff--model-dir C:\\Users\\new\\models\r\n--lora-dir "D:\\big disk\\"\r\n')
    assert found.settings.model_dir == "C:\\Users\\new\\models"
    assert found.settings.lora_dir == "D:\\big disk\\"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('--verbose\n--model "a\n', "CMD_FLAGS.txt line 2: a quotation mark is not closed. Close it."),
        ("--listn\n", "CMD_FLAGS.txt: unknown flag or value '--listn'. Did you mean --listen?"),
        ("--listen-port 99999\n", "CMD_FLAGS.txt: listen_port cannot be '99999'"),
    ],
)
def test_a_malformed_flags_file_names_itself_and_the_fix(text, message):
    assert message in refused(flag_texts=[text])


# --- settings.yaml ------------------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_warned_about_and_kept():
    found = load((), (), [Text("settings.yaml", "temprature: 1\nspellcheck: true\ntop_k: 3")], GROUPS)
    assert found.unknown == (("temprature", 1), ("spellcheck", True))
    assert (
        found.warnings[0] == "settings.yaml: 'temprature' is not a setting of this version; it is kept but has no effect. Did you mean 'temperature'?"
    )
    assert len(found.warnings) == 2
    kept = parse_yaml(Text("x", saved({"top_k": 4}, found.unknown)))
    assert kept == {"top_k": 4, "temprature": 1, "spellcheck": True}


def test_keys_of_extensions_are_kept_silently():
    found = load((), (), [Text("settings.yaml", "whisper-language: en\nmy_ext-list: [1, {a: 2}]")], GROUPS)
    assert found.warnings == () and dict(found.unknown) == {"whisper-language": "en", "my_ext-list": [1, {"a": 2}]}


def test_a_setting_spelt_with_a_hyphen_is_not_taken_for_an_extensions():
    found = load((), (), [Text("settings.yaml", "listen-port: 1")], GROUPS)
    assert "Did you mean 'listen_port'?" in found.warnings[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\nc: 2\n", "settings.yaml line 3: "),
        ("a: 'x\n", "settings.yaml line "),
        ("top_k: {\n", "settings.yaml line "),
        ("a:\tb\n\tc: d\n", "settings.yaml line "),
        ("- top_k\n", "settings.yaml: expected lines of the form 'name: value'."),
        ("just text", "settings.yaml: expected lines of the form"),
        ("1: 2", "settings.yaml: expected lines of the form"),
        ("? [a]\n: b", "settings.yaml line 1"),
        ("x: 2024-99-99", "settings.yaml: it is not YAML."),
        ("seed: " + "9" * 5000, "settings.yaml: it is not YAML."),
        ("[" * 5000, "settings.yaml"),
        ("x: !!python/object/apply:os.system [true]", "settings.yaml line 1: "),
        ("top_k: \x00", "settings.yaml"),
        ("temperature: warm", "settings.yaml: temperature cannot be 'warm'. Use a number of at least 0."),
        ("temperature: .nan", "settings.yaml: temperature cannot be nan."),
        ("temperature: -.inf", "settings.yaml: temperature cannot be -inf."),
        ("frequency_penalty: .inf", "settings.yaml: frequency_penalty cannot be inf. Use a number."),
        ("listen: perhaps", "settings.yaml: listen cannot be 'perhaps'. Use true or false."),
        ("listen_port: true", "settings.yaml: listen_port cannot be true. Use a whole number"),
        ("lora: x", "settings.yaml: lora cannot be 'x'. Use a list of texts."),
        ("model: [a]", "settings.yaml: model cannot be ['a']. Use a text."),
        ("sampler_priority: [1, 2]", "settings.yaml: sampler_priority cannot be 1. Use a list of texts."),
        ("reasoning_effort: huge", "Use one of: low, medium, high."),
    ],
)
def test_a_malformed_settings_file_names_itself_and_the_fix(text, message):
    assert message in refused(yaml_texts=[text])


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_settings_error(text):
    for texts in (((), [Text("s", text)]), ([Text("f", text)], ())):
        try:
            load((), *texts, GROUPS)
        except SettingsError as error:
            assert str(error)
        except SystemExit:  # the text asks for help
            assert "-h" in text


def test_empty_and_commented_files():
    for text in ("", "\n", "# top_k: 3\n", "---\n", "\ufeff# x\n"):
        assert load((), (), [Text("s", text)], GROUPS) == load((), (), (), GROUPS)


@pytest.mark.parametrize(
    ("spelling", "meaning"), [("true", "on"), ("false", "off"), ("auto", "auto"), ("on", "on"), ("off", "off"), ("'on'", "on"), ("yes", "on")]
)
def test_spellings_of_dark_theme(spelling, meaning):
    assert load((), (), [Text("s", f"dark_theme: {spelling}")], GROUPS).settings.dark_theme == meaning


def test_dark_theme_on_the_command_line():
    assert flags("--dark-theme", "on").settings.dark_theme == "on"
    assert flags("--dark-theme=off").settings.dark_theme == "off"


def test_saved_is_read_back_as_it_was():
    values = {"temperature": 0.5, "sampler_priority": ("top_k", "top_p"), "custom_system_message": "Ты — «друг»\nline: 2"}
    read = load((), (), [Text("s", saved(values, [("ext-x", None)]))], GROUPS)
    assert {**read.group(SamplingParams).differences(), **read.group(ChatOptions).differences()} == values
    assert "друг" in saved(values, ())
    assert yaml.safe_load(saved({}, ())) == {}


# --- the declarations themselves ----------------------------------------------------------------------------------------------------


def test_flags_of_the_earlier_system_that_this_house_keeps():
    """The Basic, Gradio/UI and API groups of the inventory, with their defaults."""
    expected = {
        "user_data_dir": "user_data", "multi_user": False, "model": "", "lora": (), "model_dir": "", "lora_dir": "", "model_menu": False,
        "settings": "", "extensions": (), "verbose": False, "idle_timeout": 0, "loader": "",
        "listen": False, "listen_port": 0, "listen_host": "", "share": False, "auto_launch": False, "gradio_auth": "", "gradio_auth_path": "",
        "ssl_keyfile": "", "ssl_certfile": "", "subpath": "",
        "api": False, "public_api": False, "public_api_id": "", "api_port": 5000, "api_key": "", "admin_key": "", "api_enable_ipv6": False,
        "api_disable_ipv4": False, "nowebui": False,
    }  # fmt: skip
    values = Settings().model_dump()
    assert {name: values[name] for name in expected} == expected


def test_no_two_classes_declare_one_name_differently():
    """A name in two classes is one flag: only loaders may share one, and then it must mean the same kind of value."""
    kinds = {}
    for cls in (Settings, *app.option_groups()):
        for name, found in cls.knobs().items():
            assert kinds.setdefault(name, found.type) == found.type, name


def test_every_knob_has_a_group_a_sentence_and_a_default_that_it_accepts():
    for cls in (Settings, *app.option_groups()):
        assert cls.build(cls().model_dump()) == cls()
        for found in cls.knobs().values():
            assert found.group and found.help.endswith(".") and "\n" not in found.help, found.name
            if found.range:
                low, high = found.bounds
                assert found.range[0] < found.range[1] and found.range[2] > 0
                assert (low is None or low <= found.range[0]) and (high is None or found.range[1] <= high), found.name


def test_a_flag_that_loaders_share_is_added_once():
    class A(Options):
        threads: int = knob(0, "Threads.", group="A")

    class B(Options):
        threads: int = knob(0, "Threads.", group="B")
        more: int = knob(0, "More.", group="B")

    found = load(["--threads", "3"], (), (), (A, B))
    assert found.group(A).threads == found.group(B).threads == 3
    assert parse_flags(["--more", "1"], (A, B), "x") == {"more": "1"}


# --- help ---------------------------------------------------------------------------------------------------------------------------


def help_text(monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return parser((Settings, *app.option_groups())).format_help()


def test_help_lists_every_flag_in_its_group(monkeypatch):
    text = help_text(monkeypatch)
    sections = {}
    for line in text.splitlines():
        title = re.fullmatch(r"(\S.*):", line)
        if title:
            section = sections.setdefault(title[1], [])
        elif line.startswith("  -"):
            section.append(re.split(r"[ ,]", line.strip())[0])
    assert all(flag in words for words in sections.values() for flag in words)
    groups = {}  # a flag of several loaders stands once, with the first of them
    for cls in (Settings, *app.option_groups()):
        for found in cls.knobs().values():
            if found.flag:
                group = groups.setdefault(found.name, found.group)
                assert "--" + found.name.replace("_", "-") in sections[group], found.name
    listed = [flag for words in sections.values() for flag in words]
    assert len(listed) == len(set(listed))


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse lays its help out in another way")
def test_help_is_the_golden_file(monkeypatch):
    """After a wanted change: COLUMNS=100 python server.py --help > tests/golden/help.txt"""
    assert help_text(monkeypatch) == GOLDEN.read_text("utf-8")


def test_asking_for_help_prints_it_and_ends(capsys):
    with pytest.raises(SystemExit) as ended:
        flags("--help")
    assert ended.value.code == 0
    assert "--listen-port" in capsys.readouterr().out
