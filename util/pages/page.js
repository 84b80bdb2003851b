// Parts that all pages share. Each page shows its `data`.
const escaped = text => String(text).replace(/[&<>"']/g, sign => `&#${sign.charCodeAt()};`);
const percent = share => share < 0 ? '-' : (100 * share).toFixed(1);
const join = (items, text) => items.map(text).join('');
const sum = numbers => numbers.reduce((one, other) => one + other, 0);
const every = (selector, run) => document.querySelectorAll(selector).forEach(run);

function table(titles, rows, style = '') {
  return `<div class="wide"><table class="${style}">
    <thead><tr>${join(titles, title => `<th>${escaped(title)}</th>`)}</tr></thead>
    <tbody>${join(rows, row => `<tr>${join(row, cell => `<td>${escaped(cell)}</td>`)}</tr>`)}</tbody></table></div>`;
}

const bar = (share, colour) => `<span class="bar" style="background:${colour};width:${100 * share}%"></span>`;

// An image with its marks, and what is written below it. `image`: size (width, height) and jpeg; none: the
// marks alone. A mark has a box (x, y, width, height in pixels of the image), a colour and a text; `dashed`
// and `group`, which begin its element, are optional. The picture grows to hold the marks.
function card(image, marks, caption, attributes = '') {
  const [width, height] = image.size, size = Math.max(width, height) / 20;  // of letters
  const near = (place, side) => Math.min(Math.max(place, -side / 2), 1.5 * side);
  const [left, top, right, bottom] = marks.reduce((edges, { box: [x, y, wide, high] }) => [
    Math.min(edges[0], near(x, width)), Math.min(edges[1], near(y, height)),
    Math.max(edges[2], near(x + wide, width)), Math.max(edges[3], near(y + high, height)),
  ], [0, 0, width, height]);
  const mark = ({ box: [x, y, wide, high], colour, text, title, dashed, group = '<g>' }) => `${group}
    <title>${escaped(title || text)}</title>
    <rect x="${x}" y="${y}" width="${Math.max(wide, size / 20)}" height="${Math.max(high, size / 20)}" stroke="${colour}"
      stroke-dasharray="${dashed ? '5 4' : ''}"/>
    <text x="${Math.max(x, left)}" y="${Math.max(y - size / 4, top + size)}" fill="${colour}">${escaped(text)}</text></g>`;
  return `<figure class="card" ${attributes}>
    <svg viewBox="${left} ${top} ${right - left} ${bottom - top}" style="--size:${size}px">
    <image width="${width}" height="${height}" href="data:image/jpeg;base64,${image.jpeg}"/>${join(marks, mark)}</svg>
    <figcaption>${escaped(caption)}</figcaption></figure>`;
}

// Sort the rows of a table, the last one left aside, by the column of a title; the second click turns the order.
function sort(title) {
  const body = title.closest('table').tBodies[0], rows = [...body.rows], last = rows.pop();
  const column = title.cellIndex, down = title.className !== 'down';
  const cell = row => row.cells[column].textContent, number = row => +cell(row).replace(/^-$/, -1);
  rows.sort((one, other) => column ? number(other) - number(one) : cell(one).localeCompare(cell(other)));
  body.append(...(down ? rows : rows.reverse()), last);
  for (const one of title.parentNode.cells) one.className = one !== title ? '' : down ? 'down' : 'up';
}

// Fill the page, and let tables be sorted and cards be enlarged.
function show(title, html) {
  document.title = title;
  document.body.innerHTML = html;
  every('.sort th', one => { one.onclick = () => sort(one); });
  every('.card', one => { one.onclick = () => one.classList.toggle('big'); });
}
