"use strict";
// Sorts and filters the suspicious examples. Without JavaScript all of them are shown,
// the most suspicious first.
(function () {
  const list = document.getElementById("suspicious");
  if (!list) return;
  const items = Array.from(list.children);
  const order = document.getElementById("order");
  const filters = ["given", "suggested"].map((name) => document.getElementById(name));
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  let few = 30; // shown at first: what comes after the list is found too
  const headers = Array.from(document.querySelectorAll("th[data-key]"));

  function compared(key, sign) {
    return (a, b) => {
      const [left, right] = [a.dataset[key], b.dataset[key]];
      const [x, y] = [Number(left), Number(right)];
      const numbers = left !== "" && right !== "" && !isNaN(x) && !isNaN(y);
      const difference = numbers ? x - y : left.localeCompare(right);
      return sign * difference || a.dataset.rank - b.dataset.rank;
    };
  }

  function show() {
    let [found, shown] = [0, 0];
    for (const item of items) {
      const fits = filters.every((f) => !f.value || item.dataset[f.id] === f.value);
      found += fits;
      item.hidden = !fits || found > few;
      shown += !item.hidden;
    }
    count.textContent = `${shown} of ${items.length} shown`;
    more.parentElement.hidden = shown === found;
    more.textContent = `Show all ${found}`;
  }

  function sort() {
    const [key, direction] = order.value.split(" ");
    items.sort(compared(key, direction === "descending" ? -1 : 1));
    list.append(...items);
    for (const header of headers) {
      if (header.dataset.key === key) header.setAttribute("aria-sort", direction);
      else header.removeAttribute("aria-sort");
    }
    show();
  }

  for (const header of headers) {
    header.querySelector("button").addEventListener("click", () => {
      const again = header.getAttribute("aria-sort") === "ascending";
      order.value = header.dataset.key + (again ? " descending" : " ascending");
      sort();
    });
  }
  order.addEventListener("change", sort);
  for (const each of filters) each.addEventListener("change", show);
  more.addEventListener("click", () => {
    few = Infinity;
    show();
  });
  // A part of the address such as #row or #row+descending chooses the order at once.
  const wanted = decodeURIComponent(location.hash.slice(1)).split("+");
  const option = `${wanted[0]} ${wanted[1] || "ascending"}`;
  if (Array.from(order.options).some((each) => each.value === option)) {
    order.value = option;
  }
  document.getElementById("tools").hidden = false;
  sort();
})();
