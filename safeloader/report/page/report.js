"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;

  // ── pictures ────────────────────────────────────────────────────────────────────────────────
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const axis = () => ({ gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line") });
  const drawn = new Map();

  function layoutOf(chart, width) {
    const narrow = width < 560;
    const { xaxis, yaxis, ...rest } = chart.layout;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--text"), size: narrow ? 11 : 13, family: getComputedStyle(document.body).fontFamily },
      margin: { l: narrow ? 48 : 64, r: 12, t: 8, b: 44 },
      legend: narrow
        ? { orientation: "h", y: -0.25, yanchor: "top", x: 0, font: { size: 11 } }
        : { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
      width, height: narrow ? 280 + 14 * chart.traces.length : 340, hovermode: "closest",
      hoverlabel: { namelength: -1 },
      colorway: ["#3b82d6", "#e08a2c", "#9aa3ad", "#3fa66a", "#b65fc2", "#d4504e", "#3aa9b5", "#8d7b4b"],
      ...rest,
      xaxis: { ...axis(), ...xaxis, nticks: narrow ? 5 : 10 },
      yaxis: { ...axis(), ...yaxis },
    };
  }

  function draw(chart) {
    const place = document.getElementById(`chart-${chart.id}`);
    drawn.set(chart, place);
    return Plotly.newPlot(place, chart.traces, layoutOf(chart, place.clientWidth), {
      displaylogo: false, displayModeBar: false,
    });
  }

  // When the page is there to be read: Plotly's script is large. One picture after the other, so
  // that the page answers meanwhile.
  async function drawAll() {
    await new Promise((next) => requestAnimationFrame(() => setTimeout(next)));
    const plotly = document.createElement("script");
    plotly.textContent = document.getElementById("plotly").textContent;
    document.head.append(plotly);
    for (const chart of data.charts) {
      await draw(chart);
      await new Promise((next) => setTimeout(next));
    }
    root.dataset.ready = "yes";
  }

  function redraw() {
    for (const [chart, place] of drawn) Plotly.relayout(place, layoutOf(chart, place.clientWidth));
  }

  let resized = 0;
  addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(redraw, 150);
  });

  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", redraw);
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    redraw();
  });

  // ── tables, which are stacked on a narrow screen ────────────────────────────────────────────
  for (const table of document.querySelectorAll("table")) {
    const names = [...table.querySelectorAll("th")].map((each) => each.textContent);
    for (const row of table.tBodies[0].rows)
      [...row.cells].forEach((cell, k) => { cell.dataset.name = names[k]; });
  }

  // ── to copy ─────────────────────────────────────────────────────────────────────────────────
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {  // from file:// some browsers do not let us: then it is marked, for Ctrl+C
      getSelection().selectAllChildren(code);
      button.textContent = "marked";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });

  // ── the search ──────────────────────────────────────────────────────────────────────────────
  const { failed, left_out, slow, loaders, texts, offset_s, more } = data.search;
  const HITS = 50;
  const lower = texts.map((text) => text.toLowerCase());

  function element(tag, className, ...inside) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...inside);
    return made;
  }

  const ms = (us) => us < 1000 ? `${us} µs` : us < 1e6 ? `${+(us / 1e3).toPrecision(4)} ms` : `${+(us / 1e6).toPrecision(4)} s`;
  const clock = (seconds) => new Date((seconds + offset_s) * 1000).toISOString().slice(0, 19).replace("T", " ");

  function place(attempt, rank, epoch, batch, position) {
    const words = [`attempt ${attempt}`, `rank ${rank}`];
    for (const [name, value] of [["epoch", epoch], ["batch", batch], ["position", position]])
      if (value !== null && value !== undefined) words.push(`${name} ${value}`);
    return words.join(", ");
  }

  function hit(kind, level, index, ...said) {
    const row = element("div", "hit", element("span", `chip ${level}`, kind), " ");
    if (index !== null) row.append(element("b", "", String(index)), " ");
    for (const each of said) if (each) row.append(typeof each === "string" ? `${each} ` : each, " ");
    return row;
  }

  const quiet = (text) => element("span", "quiet", text);
  const source = (row) => texts[row[6]].includes(texts[row[7]]) ? "" : code(texts[row[7]]);
  const code = (text) => text ? element("code", "", text) : "";

  const KINDS = [
    [failed, 6, 7, 8, (row) => hit("failed", "bad", row[0], texts[row[6]], source(row), quiet(`${place(...row.slice(1, 6))}, ${texts[row[8]]}`))],
    [left_out, 6, 7, 8, (row) => hit(row[9] || "left out", "warn", row[0], texts[row[6]], source(row), quiet(`${place(...row.slice(1, 6))}, ${texts[row[8]]}`))],
    [slow, 4, 4, 5, (row) => hit("slow", "info", row[0], `median ${ms(row[1])} of ${row[3]}, longest ${ms(row[2])}`, code(texts[row[4]]), quiet(texts[row[5]]))],
  ];

  function found(query) {
    const wanted = query.toLowerCase(), isNumber = /^-?\d+$/.test(query);
    const good = new Set();
    lower.forEach((text, k) => { if (text.includes(wanted)) good.add(k); });
    const hits = [];
    let count = 0;
    for (const [rows, said, source, loader, shown] of KINDS)
      for (const row of rows) {
        const matches = isNumber
          ? String(row[0]) === query || String(row[0]).startsWith(`${query} of `)
          : good.has(row[said]) || good.has(row[source]) || good.has(row[loader]) ||
            String(row[0]).toLowerCase().includes(wanted) || String(row[9] ?? "") === wanted;
        if (matches && ++count <= HITS) hits.push(shown(row));
      }
    return [hits, count];
  }

  function nearest(values, wanted) {
    let low = 0, high = values.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < wanted) low = middle + 1; else high = middle;
    }
    return low > 0 && Math.abs(values[low - 1] - wanted) <= Math.abs(values[low] - wanted) ? low - 1 : low;
  }

  function stepHit(its, k) {
    return hit("step", "info", its.step[k], clock(its.first_s + its.at[k]),
      `waited ${ms(its.wait[k] * 1000)}`,
      quiet(`${place(its.attempt, its.rank, its.epoch[k], its.batch[k])}, ${texts[its.loader]}`));
  }

  function stepsNear(step) {
    return loaders.filter((its) => its.step.length && step <= its.step[its.step.length - 1] && step >= its.step[0])
      .map((its) => stepHit(its, nearest(its.step, step)));
  }

  // A time of day, with or without the date: the step that each loader was at.
  function stepsAt(query) {
    const parts = /^(?:(\d{4}-\d\d-\d\d)[ T])?(\d{1,2}):(\d\d)(?::(\d\d(?:\.\d+)?))?$/.exec(query);
    if (!parts) return null;
    const [, date, hour, minute, second] = parts;
    const ofDay = hour * 3600 + minute * 60 + Number(second || 0);
    const slack = second ? 1 : 60;
    const hits = [];
    for (const its of loaders) {
      if (!its.step.length) continue;
      const first = its.first_s, last = first + its.at[its.at.length - 1];
      const firstDay = date ? Date.parse(`${date}T00:00:00Z`) / 1000
        : Math.floor((first + offset_s) / 86400) * 86400;
      for (let day = firstDay; day <= (date ? firstDay : last + offset_s); day += 86400) {
        const moment = day + ofDay - offset_s;
        if (moment >= first - slack && moment <= last + slack) hits.push(stepHit(its, nearest(its.at, moment - first)));
      }
    }
    return hits;
  }

  function command(text) {
    return element("p", "", element("span", "copied", element("code", "", text),
      Object.assign(element("button", "copy", "copy"), { type: "button" })));
  }

  // As a shell takes it as one word.
  const quoted = (text) => /^[\w.,:=@%+/-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;

  const box = document.getElementById("hits");
  function search(typed) {
    const query = typed.trim();
    box.replaceChildren();
    if (!query) return;
    const step = /^step\s+(\d+)$/i.exec(query);
    if (step) {
      const hits = stepsNear(Number(step[1])).slice(0, HITS);
      box.append(...hits);
      box.append(element("p", "quiet", hits.length ? "The nearest that is kept here. Which samples were in it, on all ranks:" : "No such step is kept here. To ask the folder:"));
      box.append(command(data.step_command + step[1]));
      return;
    }
    const moments = stepsAt(query);
    if (moments) {
      box.append(...(moments.length ? moments.slice(0, HITS) : [element("p", "", "No step ran then.")]));
      return;
    }
    const [hits, count] = found(query);
    box.append(...hits);
    if (count > HITS) box.append(element("p", "quiet", `and ${(count - HITS).toLocaleString("en")} more`));
    if (!count) box.append(element("p", "", "It did not fail, was not left out, and is not among the slowest, as far as is kept here."));
    if (more.left_out || more.failed) box.append(element("p", "quiet", "Here are the newest only: older ones are in the folder."));
    if (/^-?\d+$/.test(query)) {
      box.append(element("p", "quiet", "Where and when this index was delivered:"), command(data.command + query));
    } else if (!count) {
      box.append(element("p", "quiet", "If it is an index that is text:"), command(data.command + quoted(query)));
    }
  }

  const input = document.getElementById("query");
  input.addEventListener("input", () => search(input.value));
  if (location.hash.startsWith("#q=")) {
    input.value = decodeURIComponent(location.hash.slice(3));
    search(input.value);
  }
  drawAll();
})();
