"use strict";
(() => {
  const short = (value) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    if (size >= 1e15) return value.toExponential(3).replace(/\.?0*e\+/, "e");
    for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]])
      if (size >= unit) return String(+(value / unit).toPrecision(4)) + name;
    return size !== 0 && size < 1e-4 ? value.toExponential(2) : String(+value.toPrecision(5));
  };

  // The point of a rising list that is nearest to a value.
  const nearest = (list, value) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] < value) low = middle; else high = middle;
    }
    return Math.abs(list[low] - value) <= Math.abs(list[high] - value) ? low : high;
  };

  const hidden = new Set(), charts = [];

  // The table of runs: its boxes hide runs everywhere else, its headings sort.
  const runs = document.querySelector("table.runs"), rule = document.createElement("style");
  document.head.append(rule);
  const boxes = [...runs.querySelectorAll("input[type=checkbox]")];
  const hide = () => {
    hidden.clear();
    for (const box of boxes) {
      const row = box.closest("tr");
      row.classList.toggle("off", !box.checked);
      if (!box.checked) hidden.add(+row.dataset.row);
    }
    rule.textContent = [...hidden].map((run) => `[data-run="${run}"] { display: none !important; }`).join("\n");
  };
  boxes.forEach((box) => box.addEventListener("change", hide));
  for (const button of document.querySelectorAll("[data-show]"))
    button.addEventListener("click", () => {
      boxes.forEach((box) => { box.checked = button.dataset.show === "all"; });
      hide();
    });
  for (const button of runs.querySelectorAll("[data-sort]"))
    button.addEventListener("click", () => {
      const heading = button.closest("th"), at = +button.dataset.sort + 1, body = runs.tBodies[0];
      const down = heading.getAttribute("aria-sort") === "ascending";
      runs.querySelectorAll("th[aria-sort]").forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[at].dataset.order;
      const compare = (a, b) => (isFinite(a) && isFinite(b) ? a - b : a.localeCompare(b));
      const rows = [...body.rows], known = rows.filter((row) => key(row) !== undefined);
      known.sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b)));
      body.append(...known, ...rows.filter((row) => key(row) === undefined));
    });

  // What goes on beyond its edge is marked there.
  const scrolls = [...document.querySelectorAll(".scroll")];
  const mark = (each) =>
    each.classList.toggle("more", each.scrollLeft + each.clientWidth < each.scrollWidth - 2);
  const watch = new ResizeObserver((entries) => entries.forEach((entry) => mark(entry.target)));
  for (const each of scrolls) {
    each.addEventListener("scroll", () => mark(each), { passive: true });
    watch.observe(each);
    mark(each);
  }

  // A mean that forgets: `share` of it is what was before. A value that isn't finite breaks the line.
  const smoothed = (values, share) => {
    let mean = null, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = share * (mean ?? 0) + (1 - share) * value;
      weight = share * weight + 1 - share;
      return mean / weight;
    });
  };
  const drawn = (data, line, values) => {
    const scale = (value, [low, high]) => (value - low) / (high - low);
    const log = data.log ? Math.log10 : (value) => value, y = data.y.map(log);
    let path = "", on = false;
    values.forEach((value, place) => {
      if (value === null) { on = false; return; }
      const up = scale(log(data.log ? Math.max(value, data.y[0]) : value), y);
      const across = 1000 * scale(line.x[place], data.x), down = 300 * (1 - Math.min(1, Math.max(0, up)));
      path += `${on ? "L" : "M"}${across.toFixed(1)} ${down.toFixed(1)}`;
      on = true;
    });
    return path;
  };
  const smoothing = document.querySelector("#smoothing");
  smoothing?.addEventListener("input", () => {
    const share = +smoothing.value;
    for (const { chart, data, lines, plain } of charts) {
      if (!chart.classList.contains("smooth")) continue;
      chart.querySelectorAll(".band").forEach((band) => { band.hidden = share > 0; });
      lines.forEach((line, number) => {
        const own = data.lines[number];
        own.shown = share ? smoothed(own.y, share) : own.y;
        line.setAttribute("d", share ? drawn(data, own, own.shown) : plain[number]);
      });
    }
  });

  for (const chart of document.querySelectorAll("figure.chart:has(script)")) {
    const data = JSON.parse(chart.querySelector("script").textContent);
    const lines = [...chart.querySelectorAll(".line")], plain = lines.map((line) => line.getAttribute("d"));
    charts.push({ chart, data, lines, plain });
    const plot = chart.querySelector(".plot");
    const cursor = chart.querySelector(".cursor"), tip = chart.querySelector(".tip");
    const colours = lines.map((line) => getComputedStyle(line).color);
    const places = [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    let at = places.length - 1;

    const away = () => { cursor.hidden = tip.hidden = true; };
    const show = (place) => {
      at = place;
      const x = places[at], share = (x - data.x[0]) / (data.x[1] - data.x[0]);
      const head = document.createElement("div");
      head.textContent = `${short(x)} samples`;
      const told = data.lines.flatMap((line, number) => {
        if (hidden.has(line.run) || x < line.x[0] || x > line.x[line.x.length - 1]) return [];
        return [{ value: (line.shown ?? line.y)[nearest(line.x, x)], name: line.name, colour: colours[number] }];
      });
      // Of many the highest are told, as they lie in the chart.
      told.sort((a, b) => (b.value ?? -Infinity) - (a.value ?? -Infinity));
      const rows = told.slice(0, 12).map(({ value, name, colour }) => {
        const row = document.createElement("div"), swatch = document.createElement("i");
        swatch.className = "swatch";
        swatch.style.color = colour;
        row.append(swatch, `${short(value)}  ${data.lines.length > 1 ? name : ""}`);
        return row;
      });
      if (told.length > rows.length) {
        const rest = document.createElement("div");
        rest.textContent = `and ${told.length - rows.length} below`;
        rows.push(rest);
      }
      tip.replaceChildren(head, ...rows);
      cursor.hidden = tip.hidden = false;
      cursor.style.left = `${100 * share}%`;
      // Beside the cursor, on the side that has room; never outside of the window.
      const box = plot.getBoundingClientRect(), wide = tip.offsetWidth, middle = share * box.width;
      const wanted = share > 0.5 ? middle - wide - 10 : middle + 10;
      const least = 4 - box.left, most = document.documentElement.clientWidth - box.left - wide - 4;
      tip.style.left = `${Math.max(least, Math.min(most, wanted))}px`;
    };

    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
      show(nearest(places, data.x[0] + share * (data.x[1] - data.x[0])));
    });
    plot.addEventListener("pointerleave", away);
    plot.addEventListener("blur", away);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(at); });
    plot.addEventListener("keydown", (event) => {
      const stride = event.shiftKey ? 10 : 1, last = places.length - 1;
      const goal = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: last }[event.key];
      if (event.key === "Escape") away();
      if (goal === undefined) return;
      event.preventDefault();
      show(Math.max(0, Math.min(last, goal)));
    });
  }

  for (const picture of document.querySelectorAll(".picture")) {
    const slider = picture.querySelector("input"), images = [...picture.querySelectorAll("img")];
    slider?.addEventListener("input", () => {
      images.forEach((image, number) => { image.hidden = number !== +slider.value; });
      picture.querySelector(".step").textContent = images[+slider.value].dataset.label;
      picture.querySelectorAll(".captions").forEach((texts) => {
        texts.hidden = texts.dataset.label !== images[+slider.value].dataset.label;
      });
      slider.setAttribute("aria-valuetext", images[+slider.value].dataset.label);
    });
  }
})();
