"use strict";
/* Draws the document in #data. Every text of it is set as text: nothing of it is ever read as HTML. */
(() => {
  let doc = JSON.parse(document.getElementById("data").textContent);
  const chosen = { x: "step", term: 0 };
  const charts = [];
  const PART_COLOURS = {
    queue: "--c7", start: "--c4", training: "--c0", waiting: "--c1", snapshot: "--c3", evaluation: "--c6", again: "--c5", after: "--c2",
  };
  const TOP = 6; /* pixels above a chart's plot that marks stand in */

  /* ---- small things ---- */
  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "class") node.className = value;
      else if (name === "style") Object.assign(node.style, value);
      else if (name === "onclick") node.addEventListener("click", value);
      else node.setAttribute(name, value);
    }
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      node.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return node;
  }
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const series = (i) => colour("--c" + (i % 8));
  const many = () => doc.runs.length > 1;
  const percent = (share) => (share === null || share === undefined ? "–" : (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %");
  const whole = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e9) return (value / 1e9).toPrecision(3) + " G";
    if (size >= 1e6) return (value / 1e6).toPrecision(3) + " M";
    if (size >= 1e5) return (value / 1e3).toPrecision(3) + " k";
    if (size >= 100 || value === 0) return Math.round(value).toLocaleString("en");
    if (size >= 0.01) return String(Number(value.toPrecision(3)));
    return value.toExponential(1).replace("e", "e");
  }
  function axisNumber(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    const short = (v) => String(Number(v.toPrecision(4)));
    if (size >= 1e9) return short(value / 1e9) + "G";
    if (size >= 1e6) return short(value / 1e6) + "M";
    if (size >= 1e4) return short(value / 1e3) + "k";
    if (size >= 0.001 || value === 0) return short(value);
    return value.toExponential(0);
  }
  function isRound(value) { /* 1, 2 or 5 times a power of ten */
    const first = value === null ? 0 : value / 10 ** Math.floor(Math.log10(value) + 1e-9);
    return [1, 2, 5].some((digit) => Math.abs(first - digit) < 1e-6);
  }
  function duration(seconds) {
    if (seconds === null || seconds === undefined) return "–";
    if (seconds < 60) return seconds.toFixed(seconds < 10 ? 1 : 0) + " s";
    if (seconds < 3600) return (seconds / 60).toFixed(seconds < 600 ? 1 : 0) + " min";
    if (seconds < 172800) return (seconds / 3600).toFixed(1) + " h";
    return (seconds / 86400).toFixed(1) + " days";
  }
  /* Words in backticks as code. */
  const coded = (text) => text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
  const section = (title, intro, ...children) => [el("h2", {}, title), intro && el("p", { class: "intro" }, intro), ...children];
  function table(head, rows, numbers) {
    const cell = (tag, value, i) => el(tag, numbers && i >= numbers ? { class: "number" } : {}, value === null || value === undefined ? "–" : value);
    return el("div", { class: "scroll" }, el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, head.map((value, i) => cell("th", value, i)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, i) => cell("td", value, i)))))));
  }
  function choice(label, options, value, pick) {
    const buttons = options.map(([key, text]) =>
      el("button", { type: "button", "aria-pressed": String(key === value), onclick: () => pick(key) }, text));
    return el("span", {}, label + " ", el("span", { class: "choice", role: "group", "aria-label": label }, buttons));
  }

  /* ---- headline ---- */
  function header() {
    const run = doc.runs[0];
    if (many()) return [el("h1", {}, doc.runs.length + " runs side by side"), el("p", { class: "lead" }, doc.runs.map((r) => r.name).join(" · "))];
    const steps = run.steps ? `step ${whole(run.step)} of ${whole(run.steps)}` : `step ${whole(run.step)}`;
    return [
      el("h1", {}, run.name, run.state && el("span", { class: "badge " + run.state }, run.state)),
      el("p", { class: "lead" }, `${steps}, ${number(run.tokens)} tokens trained`, run.why ? `: ${run.why.split("\n")[0]}` : ""),
    ];
  }
  function perPosition(rate) {
    return el("div", { class: "bars" }, rate.map((share, i) => [
      el("span", {}, "draft " + (i + 1)),
      el("span", { class: "bar" }, el("i", { style: { width: 100 * share + "%" } })),
      el("span", {}, percent(share)),
    ]));
  }
  const card = (label, value, note) => el("div", { class: "card" }, el("div", { class: "label" }, label), el("div", { class: "value" }, value), note && el("div", { class: "note" }, note));
  function headline(run) {
    const found = run.measured, cards = [];
    if (found) {
      cards.push(card("Acceptance length", found.acceptance_length.toFixed(2), `tokens a verify step; plain decoding has 1.00, at most ${found.draft_tokens + 1}` + (found.acceptance_length_interval ? `; ${found.acceptance_length_interval.map((value) => value.toFixed(2)).join(" to ")} with 95 % confidence` : "")));
      if (found.speed_up) cards.push(card(`Speed-up at batch size ${found.batch_size}`, found.speed_up.toFixed(2) + " ×",
        `${number(found.tokens_per_s_speculative)} beside ${number(found.tokens_per_s_plain)} tokens/s, ${found.device}, ${found.dtype}` + (found.device === "cpu" ? "; on a CPU only the acceptance length counts" : "")));
      if (found.acceptance_rate) cards.push(el("div", { class: "card" }, el("div", { class: "label" }, "Accepted by position"), perPosition(found.acceptance_rate)));
      if (found.prompts) cards.push(card("Identical outputs", `${found.identical} of ${found.prompts}`, "token for token as plain decoding"));
    } else {
      const best = bestEvaluation(run);
      if (best && best.acceptance_length) cards.push(card("Best held-out acceptance length", best.acceptance_length.toFixed(2), `after step ${whole(best.step)}, replayed on held-out text; real decoding is measured at the end`));
      const rates = run.curves.mean.tokens_per_s || [];
      const accuracy = lastKnown(run.curves.mean["accuracy/0"]);
      if (accuracy !== null) cards.push(card("Accuracy of " + run.terms[0], accuracy.toFixed(2), "in training, newest bucket of steps"));
      if (lastKnown(run.curves.mean.loss) !== null) cards.push(card("Loss", number(lastKnown(run.curves.mean.loss)), "weighted sum of all terms"));
      if (lastKnown(rates) !== null) cards.push(card("Tokens/s", number(lastKnown(rates)), "of all trainer ranks"));
    }
    return el("div", { class: "cards" }, cards);
  }
  const lastKnown = (values) => { for (let i = (values || []).length - 1; i >= 0; i--) if (values[i] !== null) return values[i]; return null; };
  function bestEvaluation(run) {
    const at = run.evaluations.step.indexOf(run.evaluations.best);
    return at < 0 ? null : { step: run.evaluations.step[at], loss: run.evaluations.loss[at], acceptance_length: run.evaluations.acceptance_length[at] };
  }
  const facts = (run) => el("dl", { class: "facts" }, run.facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  function packages(run) {
    const rows = Object.entries(run.packages);
    return rows.length > 0 && el("details", {}, el("summary", {}, "Versions of packages"), table(["package", "version"], rows));
  }
  function overview() {
    const rows = doc.runs.map((run, i) => {
      const found = run.measured || {}, best = bestEvaluation(run) || {};
      return [
        el("span", {}, el("i", { class: "dot", style: { display: "inline-block", width: "11px", height: "11px", borderRadius: "3px", marginRight: "8px", background: `var(--c${i % 8})` } }), run.name),
        run.state || "–", `${whole(run.step)}${run.steps ? " / " + whole(run.steps) : ""}`, number(run.tokens),
        found.acceptance_length ? found.acceptance_length.toFixed(2) : null, found.speed_up ? `${found.speed_up.toFixed(2)} × at ${found.batch_size}` : null,
        (found.acceptance_rate || []).map(percent).join(" ") || null, found.prompts ? `${found.identical} / ${found.prompts}` : null,
        best.acceptance_length ? best.acceptance_length.toFixed(2) : null, number(lastKnown(run.curves.mean["accuracy/0"])),
        run.findings.length || "none",
      ];
    });
    return table(["run", "state", "step", "tokens", "acceptance length", "speed-up", "by position", "identical", "best held-out", "accuracy", "off"], rows, 2);
  }

  /* ---- is it normal ---- */
  function findings(run) {
    const list = run.findings.map((found) => el("div", { class: "finding" + (found.serious ? "" : " mild") }, el("strong", {}, coded(found.what)), el("span", {}, coded(found.do))));
    const judged = doc.rules.length - run.unknown.length;
    if (!list.length) list.push(el("div", { class: "finding fine" }, el("strong", {}, "Nothing is off."), el("span", {}, `${judged} of ${doc.rules.length} rules could be judged.`)));
    const warnings = (run.measured && run.measured.warnings) || [];
    list.push(...warnings.map((text) => el("div", { class: "finding mild" }, el("strong", {}, "The measurement warns"), el("span", {}, coded(text)))));
    if (run.unknown.length) list.push(el("details", {}, el("summary", {}, `Not judged: ${run.unknown.length}`), el("ul", { class: "small soft" }, run.unknown.map((text) => el("li", {}, text)))));
    return list;
  }

  /* ---- charts ---- */
  /* A line: {name, x: {step, tokens}, y, least, greatest, colour, points, dash}. */
  function bucketLine(run, key, name, stroke) {
    const mean = run.curves.mean[key];
    if (!mean || !mean.some((value) => value !== null)) return null;
    return { name, run, x: { step: run.curves.step, tokens: run.curves.tokens }, y: mean, least: run.curves.least[key], greatest: run.curves.greatest[key], colour: stroke };
  }
  function evaluationLine(run, y, name, stroke) {
    if (!y || !y.some((value) => value !== null)) return null;
    return { name, run, x: { step: run.evaluations.step, tokens: run.evaluations.tokens }, y, colour: stroke, points: true, best: run.evaluations.best };
  }
  const isLine = (line) => line !== null && line !== undefined;
  function perTerm(make) {
    if (many()) return doc.runs.map((run, i) => make(run, chosen.term, run.name, i)).filter(isLine);
    return doc.runs[0].terms.map((name, k) => make(doc.runs[0], k, name, k)).filter(isLine);
  }
  const perRun = (make) => doc.runs.map((run, i) => make(run, many() ? run.name : null, i)).filter(isLine);
  const termName = () => (doc.runs.find((run) => run.terms.length > chosen.term) || doc.runs[0]).terms[chosen.term];
  const suffix = () => (many() ? ", " + termName() : " by term");
  function chartList() {
    const waits = [];
    doc.runs.forEach((run, i) => {
      waits.push(bucketLine(run, "waited", many() ? run.name + " trainers" : "trainers", many() ? i : 1));
      if (!many()) waits.push(bucketLine(run, "idle", "engines", 2));
    });
    return [
      ["Loss" + suffix(), "cross-entropy", perTerm((run, k, name, c) => bucketLine(run, "loss/" + k, name, c))],
      ["Accuracy" + suffix(), "share of proposals that are the target's", perTerm((run, k, name, c) => bucketLine(run, "accuracy/" + k, name, c))],
      ["Held-out accuracy" + suffix(), "the best draft is ringed", perTerm((run, k, name, c) => evaluationLine(run, run.evaluations.accuracy[k], name, c))],
      ["Held-out acceptance length", "replayed; the best draft is ringed", perRun((run, name, i) => evaluationLine(run, run.evaluations.acceptance_length, name || "acceptance length", i))],
      ["Loss, all terms", "training beside held-out", [
        ...perRun((run, name, i) => bucketLine(run, "loss", name || "training", i)),
        ...(many() ? [] : perRun((run) => evaluationLine(run, run.evaluations.loss, "held-out", 1))),
      ]],
      ["Learning rate", "", perRun((run, name, i) => bucketLine(run, "learning_rate", name || "learning rate", i))],
      ["Gradient norm", "before clipping, logarithmic", perRun((run, name, i) => bucketLine(run, "grad_norm", name || "gradient norm", i)), { log: true }],
      ["Tokens/s", "all trainer ranks", perRun((run, name, i) => bucketLine(run, "tokens_per_s", name || "tokens/s", i)), { zero: true }],
      ["Waiting", "share of the time: trainers for packs" + (many() ? "" : ", engines for work"), waits.filter(isLine), { zero: true }],
      ["Store", "GiB stored when each step was trained", perRun((run, name, i) => bucketLine(run, "store", name || "GiB", i)), { zero: true }],
    ].filter(([, , lines]) => lines.length);
  }
  function joined(lines, x) {
    const all = new Set();
    lines.forEach((line) => x(line).forEach((value) => all.add(value)));
    const xs = [...all].sort((a, b) => a - b);
    const at = new Map(xs.map((value, i) => [value, i]));
    const columns = lines.map((line) => {
      const column = new Array(xs.length).fill(undefined);
      x(line).forEach((value, i) => { column[at.get(value)] = line.y[i]; });
      return column;
    });
    return [xs, ...columns];
  }
  function atTokens(run, step) { /* where a step lies on the axis that is shown */
    if (chosen.x === "step") return step;
    const { step: steps, tokens } = run.curves;
    let low = 0, high = steps.length - 1;
    if (!steps.length || step <= 0) return 0;
    while (low < high) { const middle = (low + high) >> 1; if (steps[middle] < step) low = middle + 1; else high = middle; }
    const before = low ? steps[low - 1] : 0, t0 = low ? tokens[low - 1] : 0;
    return t0 + ((Math.min(step, steps[low]) - before) / (steps[low] - before)) * (tokens[low] - t0);
  }
  const MARKS = { attempt: ["--c7", "attempt begins"], restart: ["--c3", "ranks restart"], snapshot: ["--c2", "snapshot"], fault: ["--c5", "fault"], stop: ["--c4", "asked to stop"] };
  function drawBands(u, lines, x, marked) {
    const { left, top, width, height } = u.bbox, context = u.ctx;
    context.save();
    context.beginPath(); context.rect(left, top, width, height); context.clip();
    if (marked) {
      const starts = marked.marks.filter((mark) => mark.kind === "attempt").map((mark) => u.valToPos(atTokens(marked, mark.step), "x", true));
      context.fillStyle = colour("--band");
      starts.forEach((from, i) => { if (i % 2) { const to = i + 1 < starts.length ? starts[i + 1] : left + width; context.fillRect(from, top, to - from, height); } });
    }
    lines.forEach((line) => {
      if (!line.least || !line.greatest) return;
      context.fillStyle = series(line.colour); context.globalAlpha = 0.16;
      const xs = x(line);
      let from = 0;
      while (from < xs.length) { /* each piece without a gap */
        if (line.least[from] === null || line.greatest[from] === null) { from++; continue; }
        let to = from;
        while (to + 1 < xs.length && line.least[to + 1] !== null && line.greatest[to + 1] !== null) to++;
        context.beginPath();
        for (let i = from; i <= to; i++) context.lineTo(u.valToPos(xs[i], "x", true), u.valToPos(line.greatest[i], "y", true));
        for (let i = to; i >= from; i--) context.lineTo(u.valToPos(xs[i], "x", true), u.valToPos(line.least[i], "y", true));
        context.closePath(); context.fill();
        /* The edges, so that the extreme of a single step is seen. */
        context.strokeStyle = context.fillStyle; context.lineWidth = window.devicePixelRatio || 1; context.globalAlpha = 0.3; context.stroke();
        context.globalAlpha = 0.16;
        from = to + 1;
      }
    });
    context.restore();
  }
  function drawMarks(u, lines, x, marked) {
    const { left, top, width, height } = u.bbox, context = u.ctx, ratio = window.devicePixelRatio || 1;
    context.save();
    let snapshot = -Infinity;
    if (marked) marked.marks.forEach((mark) => {
      const at = u.valToPos(atTokens(marked, mark.step), "x", true);
      if (at < left || at > left + width) return;
      if (mark.kind === "snapshot") { if (at - snapshot < 6 * ratio) return; snapshot = at; }
      context.globalAlpha = 1;
      context.fillStyle = colour((MARKS[mark.kind] || MARKS.fault)[0]);
      const size = 7 * ratio;
      if (mark.kind === "snapshot") context.fillRect(at - ratio, top + height - size / 1.4, 2 * ratio, size / 1.4);
      else if (mark.kind === "fault") { context.beginPath(); context.arc(at, top + 5 * ratio, 2.6 * ratio, 0, 7); context.fill(); }
      else context.fillRect(at - ratio, top - TOP * ratio, 2 * ratio, size);
      if (mark.kind === "attempt" || mark.kind === "restart") { context.globalAlpha = 0.3; context.fillRect(at - ratio / 2, top, ratio, height); }
    });
    context.globalAlpha = 1;
    lines.forEach((line) => {
      if (!line.points || line.best === null || line.best === undefined) return;
      const i = line.x.step.indexOf(line.best);
      if (i < 0 || line.y[i] === null) return;
      context.strokeStyle = series(line.colour); context.lineWidth = 2 * ratio;
      context.beginPath(); context.arc(u.valToPos(x(line)[i], "x", true), u.valToPos(line.y[i], "y", true), 6 * ratio, 0, 7); context.stroke();
    });
    context.restore();
  }
  function extent(lines) {
    let low = Infinity, high = -Infinity;
    lines.forEach((line) => [line.y, line.least, line.greatest].forEach((values) => (values || []).forEach((value) => {
      if (value !== null && value !== undefined) { low = Math.min(low, value); high = Math.max(high, value); }
    })));
    return [low, high];
  }
  function chart(title, note, lines, options) {
    options = options || {};
    const x = options.x || ((line) => line.x[chosen.x]);
    const marked = many() || options.x ? null : doc.runs[0];
    const box = el("div", { class: "chart" }, el("h3", {}, title, " ", note && el("span", {}, note)));
    const host = el("div", {});
    box.append(host);
    const draw = () => {
      const [least, high] = extent(lines), low = options.zero ? Math.min(0, least) : least, flat = high - low < 1e-12, axis = { stroke: colour("--soft"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { stroke: colour("--grid"), width: 1, size: 4 }, font: "12px system-ui, sans-serif" };
      const logarithmic = options.log && low > 0;
      const pad = flat ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.06;
      const plot = new uPlot({
        width: Math.max(240, host.clientWidth), height: options.height || 230,
        padding: [12, 22, 0, 0],
        cursor: { sync: options.x ? undefined : { key: "steps" }, points: { size: 6 }, focus: { prox: 20 }, drag: { x: true, y: false } },
        focus: { alpha: 0.35 },
        legend: { markers: { width: 0, fill: (u, i) => (i ? series(lines[i - 1].colour) : "transparent") } },
        scales: {
          x: { time: false, ...(options.logX ? { distr: 3 } : {}) },
          y: logarithmic ? { distr: 3, range: [low / 1.2, high * 1.2] } : { range: [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad] },
        },
        axes: [
          { ...axis, values: (u, splits) => splits.map(axisNumber), space: 62, size: 34 },
          { ...axis, values: (u, splits) => splits.map((value) => (logarithmic && !isRound(value) ? "" : axisNumber(value))), size: 52 },
        ],
        series: [
          { label: options.xName ? options.xName : options.x ? "tokens" : chosen.x === "step" ? "step" : "tokens", value: (u, value) => (value === null || value === undefined ? "" : options.x || chosen.x === "tokens" ? number(value) : whole(value)) },
          ...lines.map((line) => ({
            label: line.name, stroke: series(line.colour), width: line.width || 1.6, spanGaps: true, dash: line.dash,
            points: { show: line.points || line.y.length < 3, size: 5, fill: series(line.colour) },
            value: (u, value) => (value === null || value === undefined ? "" : number(value)),
          })),
        ],
        hooks: { drawClear: [(u) => drawBands(u, lines, x, marked)], draw: [(u) => drawMarks(u, lines, x, marked)] },
      }, joined(lines, x), host);
      plot.ctx.canvas.setAttribute("role", "img");
      plot.ctx.canvas.setAttribute("aria-label", `${title}: ` + lines.map((line) => `${line.name} ${number(lastKnown(line.y))} at the end`).join(", "));
      return plot;
    };
    charts.push({ host, draw, plot: null, width: 0 });
    return box;
  }
  function drawCharts() {
    charts.forEach((each) => {
      const width = each.host.clientWidth;
      if (each.plot && width === each.width) return;
      if (each.plot) each.plot.destroy();
      each.width = width;
      each.plot = each.draw();
    });
  }
  function curves() {
    const most = Math.max(...doc.runs.map((run) => run.curves.size));
    const controls = [choice("Over", [["step", "steps"], ["tokens", "tokens"]], chosen.x, (key) => { chosen.x = key; render(); })];
    const terms = doc.runs.reduce((longest, run) => (run.terms.length > longest.length ? run.terms : longest), []);
    if (many() && terms.length > 1) controls.push(choice("Term", terms.map((name, k) => [k, name]), chosen.term, (k) => { chosen.term = k; render(); }));
    const kinds = many() ? [] : Object.entries(MARKS).filter(([kind]) => doc.runs[0].marks.some((mark) => mark.kind === kind));
    if (kinds.length) controls.push(el("span", { class: "key" }, kinds.map(([, [name, text]]) => el("span", {}, el("i", { style: { background: `var(${name})` } }), text))));
    const list = chartList();
    if (!list.length) return section("Curves", "No step is trained yet.");
    const intro = most > 1 ? `Lines are means of ${whole(most)} steps; the shade reaches from the least to the greatest value of them. Drag to look closer, double-click to go back.` : "Every step is drawn. Drag to look closer, double-click to go back.";
    return section("Curves", intro, el("div", { class: "controls" }, controls), el("div", { class: "charts" }, list.map((each) => chart(...each))), many() ? null : events(doc.runs[0]));
  }
  function events(run) {
    const told = run.marks.filter((mark) => mark.kind !== "snapshot");
    if (!told.length) return null;
    const count = told.reduce((sum, mark) => sum + mark.count, 0);
    return el("details", {}, el("summary", {}, `What happened: ${whole(count)} ${count === 1 ? "event" : "events"}`),
      table(["after step", "", "what", "times"], told.slice(0, 200).map((mark) => [whole(mark.step), mark.kind, mark.text, mark.count])),
      told.length > 200 && el("p", { class: "small soft" }, `and ${told.length - 200} more kinds`));
  }
  function normalChart(run) {
    const lines = run.reference_curves.filter((each) => each.x.length).map((each, i) => ({
      name: each.kind === "this" ? "this run" : each.name, x: { tokens: each.x }, y: each.y,
      colour: each.kind === "this" ? 0 : 1 + ((i - 1) % 7), width: each.kind === "this" ? 2.4 : 1.3, dash: each.kind === "project" ? [5, 4] : undefined, points: each.x.length < 6,
    }));
    if (!lines.length || !run.terms.length) return null;
    return chart(`Accuracy of ${run.terms[0]} over tokens`, "in training; dashed: the project's reference runs", lines, { x: (line) => line.x.tokens, logX: true, height: 260 });
  }

  /* ---- where the time went ---- */
  function time(run) {
    if (!run.attempts.length) return [el("p", { class: "soft" }, "The run's events tell nothing.")];
    const sums = run.attempts.map((each) => Object.values(each.parts).reduce((a, b) => a + b, 0));
    const longest = Math.max(...sums, 1e-9);
    const used = Object.keys(doc.parts).filter((name) => run.attempts.some((each) => each.parts[name] > 0));
    const rows = run.attempts.map((each, i) => [el("div", { class: "attempt" },
      el("span", {}, `attempt ${each.number}`, each.job ? ` · job ${each.job}` : ""),
      el("span", { class: "stack", style: { width: Math.max(1, (100 * sums[i]) / longest) + "%" } }, used.map((name) => el("i", { title: `${name}: ${duration(each.parts[name])}`, style: { flexGrow: each.parts[name], background: `var(${PART_COLOURS[name]})`, display: each.parts[name] > 0 ? "block" : "none" } }))),
      el("span", { class: "time" }, duration(sums[i])),
      el("span", { class: "why small" }, [each.state, `${whole(each.steps)} steps`, each.again > 0 && `${whole(each.again)} more that were trained again`, each.why.split("\n")[0]].filter(Boolean).join(", ")))]);
    const total = (name) => run.attempts.reduce((sum, each) => sum + each.parts[name], 0);
    const all = sums.reduce((a, b) => a + b, 0);
    const plan = run.plan, planned = plan.planned || {};
    const hours = Object.entries(run.node_hours);
    return [
      el("div", { class: "controls" }, el("span", { class: "key" }, used.map((name) => el("span", {}, el("i", { style: { background: `var(${PART_COLOURS[name]})` } }), name)))),
      rows,
      table(["", "what it is", "time", "share"], used.map((name) => [name, doc.parts[name], duration(total(name)), percent(total(name) / all)]), 2),
      hours.length > 0 && table(["component", "node-hours"], hours.map(([name, value]) => [name, number(value)]), 1),
      el("h3", {}, "Measured beside planned"),
      table(["", "measured", "planned"], [
        ["steps", whole(plan.measured.steps), whole(planned.steps)],
        ["tokens", number(plan.measured.tokens), number(planned.tokens)],
        ["time of training", duration(plan.measured.seconds), duration(planned.seconds)],
        ["tokens/s of all trainers, not waiting", number(plan.measured.trainer_tokens_per_s), number(planned.trainer_tokens_per_s)],
      ], 1),
      el("p", { class: "small soft" }, plan.planned ? `Planned speeds: ${planned.source}.` : `Not planned: ${plan.why}`),
    ];
  }

  /* ---- which setting to serve ---- */
  function sweep(run) {
    const found = run.measured && run.measured.sweep;
    if (!found) return null;
    const sure = (point) => (point.acceptance_length_interval ? ` (${point.acceptance_length_interval.map((value) => value.toFixed(2)).join(" to ")})` : "");
    const rows = found.points.map((point) => [
      point.set, whole(point.batch_size), point.draft_tokens ? whole(point.draft_tokens) : "none", number(point.tokens_per_s), point.speed_up.toFixed(2) + " ×",
      number(point.tokens_per_s_request), `${(1000 * point.first_token_s).toFixed(0)} ms`, point.acceptance_length ? point.acceptance_length.toFixed(2) + sure(point) : null,
      (point.acceptance_rate || []).map((share, i) => percent(share) + (point.acceptance_rate_interval ? ` (${point.acceptance_rate_interval[i].map(percent).join(" to ")})` : "")).join(", ") || null,
    ]);
    const sizes = [...new Set(found.points.map((point) => point.batch_size))], counts = [...new Set(found.points.map((point) => point.draft_tokens))];
    const total = (batch, drafts) => {
      const mine = found.points.filter((point) => point.batch_size === batch && point.draft_tokens === drafts);
      return mine.length ? mine.reduce((sum, point) => sum + point.output_tokens, 0) / mine.reduce((sum, point) => sum + point.seconds, 0) : null;
    };
    const lines = counts.map((drafts, i) => ({ name: drafts ? `${drafts} draft tokens` : "plain", run, x: { tokens: sizes }, y: sizes.map((batch) => total(batch, drafts)), colour: i, points: true }));
    return [
      sizes.length > 1 && chart("Tokens/s over requests at once", "all sets together", lines, { x: (line) => line.x.tokens, xName: "requests at once", height: 220 }),
      table(["set", "at once", "draft tokens", "tokens/s", "speed-up", "tokens/s a request", "first token", "acceptance length", "by position"], rows, 1),
      el("p", { class: "small soft" }, `Confidence intervals: ${found.interval}.`),
      Object.entries(found.best).map(([name, best]) => [
        el("h3", {}, `Best ${name}: ${best.draft_tokens ? best.draft_tokens + " draft tokens" : "no draft"} with ${best.batch_size} at once, ${number(best.tokens_per_s)} tokens/s, ${best.speed_up.toFixed(2)} × plain decoding`),
        Object.values(best.serve).map((command) => el("pre", { class: "command" }, command)),
      ]),
    ];
  }
  function differences(run) {
    const found = (run.measured && run.measured.differences) || [];
    if (!found.length) return null;
    const token = (value) => (value === null ? "ended" : String(value));
    return table(["prompt", "answer token", "plain", "speculative", "logits apart", "verdict"], found.map((each) => [
      whole(each.prompt), whole(each.position), token(each.plain), token(each.speculative), each.logit_gap === null ? "unknown" : each.logit_gap.toPrecision(3), each.verdict,
    ]), 1);
  }

  /* ---- what the draft proposes ---- */
  function answers(run) {
    if (!run.answers.length) return [el("p", { class: "soft" }, run.measured ? "This measurement kept no answers; `specbatch evaluate` measures again and keeps some." : "The draft is not measured yet.")];
    const most = (run.measured && run.measured.draft_tokens) || 3;
    const tone = (position) => `var(--t${Math.min(4, position)})`;
    const span = (text, background, title) => el("span", { style: { background }, title }, text);
    const key = el("div", { class: "controls" }, el("span", { class: "key" },
      Array.from({ length: Math.min(4, most) }, (_, i) => el("span", {}, el("i", { style: { background: tone(i + 1) } }), `accepted, draft ${i + 1}${i === 3 && most > 4 ? " and later" : ""}`)),
      el("span", {}, el("i", { style: { background: "var(--own)" } }), "the target's own: a draft was rejected here"),
      el("span", {}, el("i", { style: { background: "var(--bonus)" } }), "the target's own: all drafts before were accepted")));
    return [key, ...run.answers.map((answer) => {
      let accepted = 0, steps = 0;
      const pieces = answer.steps.map((step, number) => {
        if (number === 0) return step.tokens.map((text) => span(text, "var(--first)", "the prefill's token"));
        steps++; accepted += step.accepted;
        return step.tokens.map((text, i) => i < step.accepted ? span(text, tone(i + 1), `accepted, draft ${i + 1}`)
          : step.accepted >= most ? span(text, "var(--bonus)", "the target's own, after all drafts") : span(text, "var(--own)", `the target's own; draft ${i + 1} was rejected`));
      });
      return el("div", { class: "answer" }, el("div", { class: "prompt" }, answer.prompt), el("div", { class: "text" }, pieces),
        el("div", { class: "note" }, `${steps} verify steps, ${accepted} drafts accepted: ${(steps ? 1 + accepted / steps : 1).toFixed(2)} tokens a step`));
    })];
  }

  /* ---- the page ---- */
  function perRunSection(title, intro, make) {
    if (!many()) return section(title, intro, make(doc.runs[0]));
    return section(title, intro, doc.runs.map((run, i) => el("details", doc.runs.length <= 4 ? { open: "" } : {}, el("summary", {}, run.name), make(run, i))));
  }
  function render() {
    charts.forEach((each) => each.plot && each.plot.destroy());
    charts.length = 0;
    const page = document.getElementById("page"), run = doc.runs[0], open = [...page.querySelectorAll("details")].map((each) => each.open);
    const parts = [
      header(),
      many() ? overview() : [headline(run), facts(run), packages(run)],
      many() && section("What is different", "Settings that are not the same in all runs.",
        doc.differences.length ? table(["setting", ...doc.runs.map((each) => each.name)], doc.differences) : el("p", { class: "soft" }, "All settings are the same.")),
      perRunSection("Is it normal?", "By rules, and beside other runs after as many tokens.", (each) => [findings(each), many() ? null : normalChart(each)]),
      curves(),
      perRunSection("Where the time went", "Each attempt, from the queue to its end.", time),
      doc.runs.some((each) => each.measured && each.measured.sweep) && perRunSection("Which setting to serve", "Requests at once, draft tokens and sets of prompts, each measured in the engine.", (each) => sweep(each) || el("p", { class: "soft" }, "Not measured (evaluate.sweep).")),
      doc.runs.some((each) => each.measured && (each.measured.differences || []).length) && perRunSection("Where outputs differ from plain decoding", "The first difference of each answer, numbered from 0. Logits that are almost equal are decided by rounding.", (each) => differences(each) || el("p", { class: "soft" }, "Nowhere.")),
      perRunSection("What the draft proposes", "Answers to held-out prompts, by real speculative decoding.", answers),
      el("footer", {}, `Made by specbatch ${doc.version}, ${doc.made}${doc.live ? "; looks for news every 10 s" : ""}.`),
    ];
    page.replaceChildren(...parts.flat(Infinity).filter(Boolean));
    const now = [...page.querySelectorAll("details")];
    if (now.length === open.length) now.forEach((each, i) => { each.open = open[i]; });
    drawCharts();
    page.dataset.charts = String(charts.filter((each) => each.plot).length);
  }
  render();
  new ResizeObserver(() => setTimeout(drawCharts, 0)).observe(document.getElementById("page"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
  if (doc.live) setInterval(async () => {
    try {
      const answer = await fetch(doc.live, { cache: "no-store" });
      if (!answer.ok) return;
      const found = await answer.json();
      if (document.hidden || JSON.stringify(found.runs) === JSON.stringify(doc.runs)) return;
      doc = found;
      render();
    } catch { /* the run's host is not reached: what is shown stays */ }
  }, 10000);
})();
