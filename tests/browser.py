"""A page in a real browser, Chromium within Qt: python -m tests.browser FILE SCRIPT.

Prints what a script says of the page, as JSON.
"""

from __future__ import annotations

import json
import sys

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

PATIENCE_MS = 60_000


def main() -> int:
    file, script = sys.argv[1:]
    application = QApplication(["browser", "--no-sandbox", "--disable-gpu"])
    view = QWebEngineView()
    view.resize(1200, 900)
    view.show()  # so that there is a viewport to lay it out in
    page = view.page()
    assert page is not None

    def said(answer: object) -> None:
        print(json.dumps(answer))
        application.exit(0)

    def loaded(is_there: bool) -> None:
        if is_there:
            page.runJavaScript(script, said)
        else:
            application.exit(1)

    page.loadFinished.connect(loaded)
    page.load(QUrl.fromLocalFile(file))
    QTimer.singleShot(PATIENCE_MS, lambda: application.exit(2))
    status: int = application.exec()
    return status


if __name__ == "__main__":
    sys.exit(main())
