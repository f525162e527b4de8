"""A run as one page: the content of ``specbatch report``, read from the run's directory alone.

- `reading`: the files of a run directory;
- `history`: its events: when each step was trained, what engines and store did, what went wrong;
- `spent`: where the time went;
- `thin`: curves with fewer points and all their extremes;
- `references`: curves of other runs, for comparison;
- `rules`: what is not normal, in sentences;
- `document`: all of that as one JSON document;
- `page`: the document as one HTML file; `live`: the same, served while the run is going on.

**Charts** are drawn by uPlot 1.6.32 (MIT, https://github.com/leeoniya/uPlot), which is shipped in ``assets/`` as its
authors publish it, with its licence. Its 51 KB fit into each page, so that a page needs no network; it draws on one
canvas, which takes thousands of points on a phone; it needs no other library. Weighed and left: Plotly (3.5 to 4.6 MB a
page, more than a page may have), ECharts (1 MB), Chart.js (200 KB, an object for each point), Vega-Lite (three
libraries, 800 KB), SVG made by matplotlib (no reading of values, another dependency for the login node).

**No page trusts its data.** The document is a JSON block in which no ``<`` is left, the page's own program writes all
of it as text, and the page's content security policy runs no program but the two whose hashes it names.
"""
