"""The summary of a run."""

from importlib.metadata import version

from distill.callbacks.results import versions


def test_a_package_that_is_not_installed_is_left_out_of_the_versions():
    assert versions(["torch", "distill-no-such-package"]) == {"torch": version("torch")}
