"""--dax-window and --dax-policy as an operator writes them."""

import pytest

from vfsd.errors import ConfigError
from vfsd.hostfs.dax import AUTO, DaxPolicy
from vfsd.options.checks import check_dax_policy, check_dax_window


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2M", 2 << 20),
        ("2097152", 2 << 20),
        ("4096k", 4 << 20),
        ("512M", 512 << 20),
        ("8G", 8 << 30),
        ("1t", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert check_dax_window("--dax-window", text) == size


@pytest.mark.parametrize("text", ["0", "0M", "1M", "2047k", "3M", "2097153", "2T", "9" * 20, "9" * 2000])
def test_sizes_that_are_no_window(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--dax-window: .*(in steps of 2M|is no size)"):
        check_dax_window("--dax-window", text)


@pytest.mark.parametrize("text", ["", "M", "-2M", "2MB", "1.5G", "2 M", "\u0662M", "0x200000"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size; give bytes"):
        check_dax_window("--dax-window", text)


def test_policies() -> None:
    assert check_dax_policy("--dax-policy", "auto") == AUTO
    assert check_dax_policy("--dax-policy", "always") == DaxPolicy(size_min=0)
    assert check_dax_policy("--dax-policy", "never") == DaxPolicy()
    assert check_dax_policy("--dax-policy", "inode") == DaxPolicy(marked=True)
    assert check_dax_policy("--dax-policy", "whole") == DaxPolicy(size_min=2 << 20, whole=True)
    assert check_dax_policy("--dax-policy", "size:32K") == DaxPolicy(size_min=32768)
    for text in ("size", "size:", "size:x", "big", ""):
        with pytest.raises(ConfigError, match="--dax-policy: "):
            check_dax_policy("--dax-policy", text)
