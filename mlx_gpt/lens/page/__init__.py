"""One HTML file that shows the inside of a model: living, it computes; recorded, it shows what was traced.

``bundle.py`` joins the file from ``page.html``, ``style.css`` and the modules in ``js/``, which begin at ``main.js``.
``living.py`` and ``recorded.py`` make its data.
"""

from __future__ import annotations
