"""Use the launch panel like a person: JupyterLab in headless Chromium, real clicks, real processes.

python scripts/launch_browser.py [folder for pictures]

Needs jupyterlab, ipywidgets and playwright from PyPI, and a Chromium (CHROMIUM=/path/to/it, default /usr/bin/chromium)."""
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
from playwright.sync_api import TimeoutError, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
pictures = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="launch-"))
pictures.mkdir(parents=True, exist_ok=True)
work = Path(tempfile.mkdtemp(prefix="launch-lab-"))
runs, token = work / "cache" / "launched", secrets.token_hex(16)
env = os.environ | {"ASTROBIO_CACHE": str(work / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": str(work / "config"),
                    "JUPYTER_DATA_DIR": str(work / "data"), "JUPYTER_RUNTIME_DIR": str(work / "runtime"), "JUPYTER_TOKEN": token}
OPTIONS = "options=dict(n=160, seconds=0.05)"

nb = nbformat.read(ROOT / "nbs/tutorials/launch_training.ipynb", 4)
code = [c for c in nb.cells if c.cell_type == "code"]
code[1].source = code[1].source.replace("processes=2)", f"processes=2, changes=dict({OPTIONS}))")
nb.cells = code[:2]
for c in nb.cells:
    c.outputs = []
nbformat.write(nb, work / "launch.ipynb")


def serve():
    """A server with a token on the loopback interface; (process, address)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = ["--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--expose-app-in-browser",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", f"--ServerApp.root_dir={work}"]
    if os.geteuid() == 0:
        options.append("--allow-root")  # for machines of tests; the container of this project is not root
    with open(work / "server.log", "ab") as log:
        p = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log, start_new_session=True)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=5).read()
            return p, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.2)
    raise SystemExit((work / "server.log").read_text()[-3000:])


def command(page, name, **args):
    page.evaluate("([name, args]) => window.jupyterapp.commands.execute(name, args)", [name, args])


def open_and_run(page, address, run=True):
    page.goto(f"{address}/lab/tree/launch.ipynb?token={token}&reset", timeout=120_000)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    page.wait_for_function("() => window.jupyterapp && document.querySelector('.jp-NotebookPanel')", timeout=60_000)
    if run:
        run_all(page)


def run_all(page):
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=120_000)
    command(page, "notebook:run-all-cells")


def state(page, *wanted, seconds=120):
    page.wait_for_selector(", ".join(f'[data-state="{w}"]' for w in wanted), timeout=1000 * seconds)


def steps(page):
    found = re.search(r"(\d+) / (\d+|\?)", page.inner_text(".jp-NotebookPanel"))
    return int(found.group(1)) if found else 0


def moves(page, seconds=60):
    """The number of steps that the page shows grows."""
    first, end = steps(page), time.time() + seconds
    while steps(page) <= first:
        assert time.time() < end, f"still at step {first} after {seconds} s"
        time.sleep(0.3)


def click(page, name):
    page.locator(f'button:has-text("{name}"):not([disabled])').first.click()


def picture(page, name):
    time.sleep(2.5)
    page.screenshot(path=str(pictures / f"{name}.png"))
    print("drawn:", name, "at step", steps(page), flush=True)


def keeper():
    run = next(runs.glob("*/status.json"))
    return json.loads(run.read_text())["keeper"]["pid"]


def main():
    server, address = serve()
    try:
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 960})
            page.on("dialog", lambda d: d.accept())
            open_and_run(page, address)
            page.wait_for_selector('button:has-text("start")', timeout=120_000)
            picture(page, "1_panel")
            click(page, "start")
            state(page, "running")
            moves(page)
            page.wait_for_function("() => [...document.querySelectorAll('.jp-NotebookPanel img')].some(i => i.naturalWidth > 300)", timeout=60_000)
            picture(page, "2_running")
            click(page, "stop")
            state(page, "stopped")
            picture(page, "3_stopped")
            click(page, "resume")
            state(page, "running")
            moves(page)
            who = keeper()
            command(page, "docmanager:save")
            picture(page, "4_resumed")
            page.reload()
            page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
            try:  # widgets come back from the live kernel, without running anything
                state(page, "running", seconds=30)
                print("after the reload the widgets came back by themselves", flush=True)
            except TimeoutError:
                print("after the reload the cell was run again", flush=True)
                run_all(page)
                state(page, "running", "finished")
            moves(page)
            picture(page, "5_reloaded")
            page.evaluate("() => { window.jupyterapp.commands.execute('notebook:restart-kernel') }")
            page.click(".jp-Dialog button.jp-mod-accept")
            time.sleep(3)
            run_all(page)
            time.sleep(1)
            state(page, "running")
            moves(page)
            assert keeper() == who, "another keeper"
            picture(page, "6_kernel_restarted")
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            os.kill(who, 0)  # still there
            server, address = serve()
            open_and_run(page, address)
            state(page, "running", "finished")
            assert keeper() == who, "another keeper"
            picture(page, "7_server_killed")
            state(page, "finished", seconds=300)
            picture(page, "8_finished")
            browser.close()
    finally:
        subprocess.run([sys.executable, "-c", "import os, signal, sys; os.killpg(int(sys.argv[1]), signal.SIGKILL)", str(server.pid)], check=False)
        server.wait()
        for s in runs.glob("*/status.json"):
            if json.loads(s.read_text())["state"] in ("starting", "running"):  # something went wrong above
                os.kill(json.loads(s.read_text())["keeper"]["pid"], signal.SIGTERM)
    script = ("import sys; from astrobio.launch import *; from astrobio.train.launch import *;"
              f"start(spread_over(launch_drill({OPTIONS}), 2), sys.argv[1]).wait(seconds=300)")
    subprocess.run([sys.executable, "-c", script, str(work / "undisturbed")], env=env, check=True)
    run = next(runs.glob("*/metrics.jsonl"))
    assert run.read_bytes() == (work / "undisturbed" / "metrics.jsonl").read_bytes(), "metrics differ from those of the undisturbed run"
    print("metrics equal those of an undisturbed run, byte for byte\npictures:", pictures)
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
