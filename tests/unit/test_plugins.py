"""Registries: lazy, typed, without duplicates, fed by code and by installed distributions."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoints
from pathlib import Path

import pytest

from inference_shardformer import plugins
from inference_shardformer.errors import PluginError
from inference_shardformer.plugins import Registry

GROUP = "inference_shardformer.test_group"


def install(folder: Path, distribution: str, entry_points: str, **modules: str) -> None:
    """Put a distribution with metadata and modules into a folder, as pip would."""
    info = folder / f"{distribution}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry_points}\n")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def registry() -> Registry[type]:
    return Registry("gadget", entry_point_group=GROUP)


class TestRegister:
    def test_objects_and_import_paths(self, registry):
        registry.register("set", set)
        registry.register("ordered", "collections:OrderedDict")
        assert registry.names() == ("set", "ordered")
        assert registry.get("set") is set
        assert registry.get("ordered").__name__ == "OrderedDict"

    def test_nested_attribute(self, registry):
        registry.register("join", "os:path.join")
        assert registry.get("join")("a", "b") == "a/b"

    def test_nothing_is_imported_before_get(self, registry, site):
        (site / "lazy_gadget.py").write_text("class Gadget: pass\n")
        registry.register("lazy", "lazy_gadget:Gadget")
        assert registry.names() == ("lazy",)
        assert registry.origin("lazy") == "lazy_gadget:Gadget"
        assert "lazy_gadget" not in sys.modules
        assert registry.get("lazy").__name__ == "Gadget"

    def test_the_import_path_is_known_without_importing(self, registry):
        registry.register("set", set)
        registry.register("lazy", "no_such_gadget_module:Gadget")
        assert (registry.import_path("set"), registry.import_path("lazy")) == (None, "no_such_gadget_module:Gadget")
        with pytest.raises(PluginError, match=r"unknown gadget 'laz'; did you mean 'lazy'\?"):
            registry.import_path("laz")

    def test_a_duplicate_names_both_origins(self, registry):
        registry.register("thing", "collections:OrderedDict")
        with pytest.raises(PluginError, match="by collections:OrderedDict and by builtins:set"):
            registry.register("thing", set)
        assert registry.get("thing").__name__ == "OrderedDict"

    @pytest.mark.parametrize("path", ["collections", "collections:", ":OrderedDict", ""])
    def test_a_malformed_path_is_refused(self, registry, path):
        with pytest.raises(PluginError, match="is not an import path") as caught:
            registry.register("thing", path)
        assert "module:Name" in caught.value.remedy


class TestGet:
    def test_unknown_name_suggests_and_lists(self, registry):
        registry.register("hammer", set)
        registry.register("saw", dict)
        with pytest.raises(PluginError, match=r"'hamer'; did you mean 'hammer'\? \(known: hammer, saw\)"):
            registry.get("hamer")
        with pytest.raises(PluginError, match=r"'xyzzy' \(known: hammer, saw\)"):
            registry.origin("xyzzy")

    def test_unknown_name_in_an_empty_registry(self, registry):
        assert registry.unknown("saw") == "unknown gadget 'saw' (known: none)"

    @pytest.mark.parametrize(
        ("path", "cause"),
        [("no_such_gadget_module:X", ModuleNotFoundError), ("collections:NoSuchName", AttributeError)],
    )
    def test_a_failed_load_keeps_its_cause(self, registry, path, cause):
        registry.register("broken", path)
        with pytest.raises(PluginError, match=f"'broken' from {path} failed to load: {cause.__name__}") as caught:
            registry.get("broken")
        assert isinstance(caught.value.__cause__, cause)

    def test_whatever_a_module_raises_becomes_a_plugin_error(self, registry, site):
        (site / "exploding_gadget.py").write_text("raise ZeroDivisionError('boom')\n")
        registry.register("broken", "exploding_gadget:X")
        with pytest.raises(PluginError, match="ZeroDivisionError: boom"):
            registry.get("broken")

    def test_the_check_refuses_a_broken_contract(self):
        registry: Registry[int] = Registry("number", check=lambda x: None if isinstance(x, int) else f"{x!r} is no int")
        registry.register("one", 1)
        registry.register("path", "os:sep")
        assert registry.get("one") == 1
        with pytest.raises(PluginError, match="'path' from os:sep broke its contract: '/' is no int"):
            registry.get("path")


class TestEntryPoints:
    def test_found_without_importing(self, registry, site):
        install(site, "acme", "rocket = acme_gadgets:Rocket", acme_gadgets="class Rocket: pass\n")
        registry.register("built_in", set)
        assert registry.names() == ("built_in", "rocket")
        assert registry.origin("rocket") == "entry point rocket = acme_gadgets:Rocket of acme 1.2"
        assert "acme_gadgets" not in sys.modules
        assert registry.get("rocket").__name__ == "Rocket"

    def test_searched_only_when_asked(self, registry, site):
        registry.register("built_in", set)
        install(site, "late", "late = late_gadgets:X")
        assert "late" in registry.names()

    @pytest.mark.parametrize("name", ["auto", "tuned"])
    def test_reserved_names_are_refused_wherever_they_come_from(self, registry, site, name):
        with pytest.raises(PluginError, match=f"gadget '{name}' from builtins:set: the name is reserved") as caught:
            registry.register(name, set)
        assert "another name" in caught.value.remedy
        install(site, "greedy", f"{name} = greedy_gadgets:X")
        with pytest.raises(PluginError, match=r"reserved") as caught:
            registry.names()
        assert "greedy 1.2" in str(caught.value)

    def test_without_a_group_nothing_is_searched(self, site):
        install(site, "acme2", "rocket2 = acme2_gadgets:Rocket")
        assert Registry("gadget").names() == ()

    def test_a_clash_names_both_origins_every_time(self, registry, site):
        install(site, "first", "fine = first_gadgets:Fine\nclash = first_gadgets:X")
        install(site, "second", "clash = second_gadgets:X")
        for _ in range(2):
            with pytest.raises(PluginError, match=r"'clash' is registered twice") as caught:
                registry.names()
            assert "of first 1.2" in caught.value.message
            assert "of second 1.2" in caught.value.message

    def test_a_plugin_cannot_take_a_built_in_name(self, registry, site):
        install(site, "usurper", "built_in = usurper_gadgets:X")
        registry.register("built_in", "collections:OrderedDict")
        with pytest.raises(PluginError, match="by collections:OrderedDict and by entry point built_in"):
            registry.get("built_in")

    def test_distributions_are_read_once_for_all_registries(self, site, monkeypatch):
        calls = []
        monkeypatch.setattr(plugins, "entry_points", lambda: calls.append(1) or EntryPoints())
        for kind in ("gadget", "widget"):
            assert Registry(kind, entry_point_group=kind).names() == ()
        assert calls == [1]

    def test_a_folder_that_joins_the_path_later_is_read(self, registry, site, monkeypatch):
        assert registry.names() == ()
        install(site / "late", "acme", "rocket = acme_gadgets:Rocket")
        monkeypatch.syspath_prepend(str(site / "late"))
        assert Registry("gadget", entry_point_group=GROUP).names() == ("rocket",)

    def test_the_same_entry_listed_twice_is_one(self, registry, site, monkeypatch):
        install(site, "acme", "rocket = acme_gadgets:Rocket")
        install(site / "copy", "acme-copy", "rocket = acme_gadgets:Rocket")
        monkeypatch.syspath_prepend(str(site / "copy"))
        assert registry.names() == ("rocket",)
