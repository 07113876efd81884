"""A browser without a screen, where Chromium and its driver are installed."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def opened(*, width: int, dark: bool) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def browse() -> Iterator[Callable[..., Any]]:
    """Opens a browser of a width, light or dark."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: the page is not looked at")
    pytest.importorskip("selenium", reason="selenium is not installed: the page is not looked at")
    with contextlib.ExitStack() as stack:
        yield lambda width=1200, dark=False: stack.enter_context(opened(width=width, dark=dark))


@pytest.fixture
def rgb() -> Callable[[str], tuple[int, ...]]:
    """The numbers of a colour as a browser says it."""
    import re

    return lambda text: tuple(int(part) for part in re.findall(r"\d+", text)[:3])
