"use strict";
(() => {
  const short = (value) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
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

  for (const chart of document.querySelectorAll("figure.chart:has(script)")) {
    const data = JSON.parse(chart.querySelector("script").textContent);
    const plot = chart.querySelector(".plot");
    const cursor = chart.querySelector(".cursor"), tip = chart.querySelector(".tip");
    const colours = [...chart.querySelectorAll(".line")].map((line) => getComputedStyle(line).color);
    const places = [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    let at = places.length - 1;

    const hide = () => { cursor.hidden = tip.hidden = true; };
    const show = (place) => {
      at = place;
      const x = places[at], share = (x - data.x[0]) / (data.x[1] - data.x[0]);
      const head = document.createElement("div");
      head.textContent = `${short(x)} samples`;
      const rows = data.lines.map((line, number) => {
        if (x < line.x[0] || x > line.x[line.x.length - 1]) return null;
        const row = document.createElement("div"), swatch = document.createElement("i");
        swatch.className = "swatch";
        swatch.style.color = colours[number];
        const own = nearest(line.x, x);
        row.append(swatch, `${short(line.y[own])}  ${data.lines.length > 1 ? line.name : ""}`);
        return row;
      });
      tip.replaceChildren(head, ...rows.filter(Boolean));
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
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(at); });
    plot.addEventListener("keydown", (event) => {
      const stride = event.shiftKey ? 10 : 1, last = places.length - 1;
      const goal = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: last }[event.key];
      if (event.key === "Escape") hide();
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
      slider.setAttribute("aria-valuetext", images[+slider.value].dataset.label);
    });
  }
})();
