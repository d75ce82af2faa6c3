"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures");
  const charts = read("charts");

  // Themes: the reader's own, until the button is pressed.
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (isDark) => {
    root.dataset.theme = isDark ? "dark" : "light";
    button.textContent = isDark ? "Light theme" : "Dark theme";
    button.setAttribute("aria-pressed", String(isDark));
  };
  setTheme(dark.matches);
  dark.addEventListener("change", (event) => setTheme(event.matches));
  button.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));

  const drawn = [...document.querySelectorAll("[data-chart]")].map((place) =>
    window.vegaEmbed(place, charts[place.dataset.chart], { renderer: "svg", actions: false, mode: "vega-lite" })
  );
  Promise.all(drawn).then(
    () => { root.dataset.drawn = "all"; },
    (error) => { root.dataset.drawn = "failed"; throw error; }
  );

  const samples = figures.shown;
  if (!samples.length) return;
  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const number = (value) => value.toLocaleString("en-US");
  // What would be invisible, or would reorder its neighbours, is written as a code.
  const visible = (text) =>
    text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
      (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0")).replace(/\n/g, "\u21b5\n");

  const select = document.getElementById("sample");
  const place = document.getElementById("text");
  const about = document.getElementById("about");
  const bounds = document.getElementById("bounds");
  samples.forEach((sample, at) => select.append(new Option(number(sample.sample), String(at))));

  const documentOf = (part) => {
    const box = element("div", undefined, "doc");
    const origin = element("p", undefined, "origin");
    const name = part.link ? element("a", part.source) : element("bdi", part.source);
    if (part.link) { name.href = part.link; name.rel = "noreferrer"; }
    origin.append(name, ` row ${number(part.row)}, tokens ${number(part.first)} to ${number(part.end - 1)} of ${number(part.tokens)} `);
    for (const [key, value] of Object.entries(part.metadata)) origin.append(element("bdi", ` ${key}: ${value} `));
    const tokens = element("p", undefined, "tokens");
    let ids = [];
    part.texts.forEach((text, at) => {
      ids.push(part.ids[at]);
      if (!text) return;  // a character that is not whole yet
      const span = element("span", visible(text));
      span.title = `id ${ids.join(" ")}, token ${number(part.first + at)} of the document`;
      tokens.append(span);
      ids = [];
    });
    box.append(origin, tokens);
    return box;
  };
  const show = () => {
    const sample = samples[Number(select.value)];
    const held = sample.documents.reduce((sum, part) => sum + part.texts.length, 0) + sample.padding;
    about.textContent =
      `Sample ${number(sample.sample)}${sample.id ? `, id ${sample.id}` : ""}: ${number(sample.tokens)} tokens from token ` +
      `${number(sample.begin)} of the stream on` + (sample.padding ? `, ${number(sample.padding)} of them padding` : "") +
      (held < sample.tokens ? `; the first ${number(held)} are here` : "") + ".";
    place.replaceChildren(...sample.documents.map(documentOf));
    place.classList.toggle("coloured", bounds.checked);
    place.scrollTop = 0;
  };
  const step = (by) => {
    select.value = String((Number(select.value) + by + samples.length) % samples.length);
    show();
  };
  select.addEventListener("change", show);
  bounds.addEventListener("change", show);
  document.getElementById("before").addEventListener("click", () => step(-1));
  document.getElementById("after").addEventListener("click", () => step(1));
  show();
})();
