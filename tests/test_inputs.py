"""Image sets as a user names them."""

from ood_heatmap.pipeline.inputs import near_names, split_named_source


def test_names_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert split_named_source("photos") == ("photos", "photos")
    assert split_named_source("x=photos") == ("x", "photos")
    assert split_named_source("svhn/test") == ("svhn", "svhn/test")
    assert split_named_source("x=svhn/test") == ("x", "svhn/test")
    for pattern, name in {
        "data/dtd-{00..12}.tar": "dtd",
        "data/dtd_*.tar": "dtd",
        "data/*.tar": "data",
        "x=data/*.tar": "x",
    }.items():
        assert split_named_source(pattern) == (name, pattern.removeprefix("x="))


def test_a_near_set_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "cifar100").mkdir(parents=True)
    sets = ("data/cifar100", "n=svhn/test", "x=cifar100")
    for given in ("n", "svhn/test", "n=svhn/test"):
        assert near_names((given,), sets) == ("n",)
    assert near_names(("data/cifar100/",), sets) == ("cifar100",)
    # a name goes before a source of the same text
    assert near_names(("cifar100", "data/cifar100"), sets) == ("cifar100",)
    assert near_names(("nowhere",), sets) == ("nowhere",)
