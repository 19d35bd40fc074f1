// The page of policy/data/view.py: D is the episode, as data() there makes it. Everything is drawn on canvases at the step `at`.
const floats = text => { const raw = atob(text), bytes = new Uint8Array(raw.length); for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i)
  return new Float32Array(bytes.buffer) }
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()
const hue = (i, n) => n < 2 ? css('--one') : `hsl(${(215 + 360 * i / n) % 360} 70% ${matchMedia('(prefers-color-scheme:dark)').matches ? 65 : 45}%)`
const short = x => Number.isFinite(x) ? (Math.abs(x) >= 1e4 || (x && Math.abs(x) < 1e-3) ? x.toExponential(2) : String(+x.toPrecision(4))) : 'nan'
const shade = { error: '--bad', warning: '--two', note: '--one' }
const $ = id => document.getElementById(id)
const LEFT = 66  // of a plot, for -1.23e-10 at 11 px
let at = 0, timer = null
const redraw = []

function canvas(box, height, draw) {
  const c = document.createElement('canvas'); c.style.width = '100%'; c.style.height = height + 'px'; box.append(c)
  const paint = () => { const r = devicePixelRatio || 1, w = c.clientWidth
    if (c.width !== Math.round(w * r)) { c.width = Math.round(w * r); c.height = Math.round(height * r) }
    const g = c.getContext('2d'); g.setTransform(r, 0, 0, r, 0, 0); g.clearRect(0, 0, w, height); draw(g, w, height) }
  redraw.push(paint); return c
}

function card(title, small, into) {
  const box = document.createElement('div'); box.className = 'card'
  const h = document.createElement('h3'); h.textContent = title
  const s = document.createElement('small'); s.textContent = small; h.append(s); box.append(h); $(into).append(box); return box
}

// ---------------------------------------------------------------- channels over time
function lines(key) {
  const x = floats(key.values), c = key.labels.length, m = x.length / c, on = new Array(c).fill(true)
  const row = step => Math.min(m - 1, Math.round(step / key.every))
  const box = card(key.name, [key.unit, key.every > 1 ? `every ${key.every}th step` : ''].filter(Boolean).join(', '), 'plots')
  const bounds = group => { let lo = Infinity, hi = -Infinity
    for (let i = 0; i < x.length; i++) if (on[i % c] && group.includes(i % c) && Number.isFinite(x[i])) { if (x[i] < lo) lo = x[i]; if (x[i] > hi) hi = x[i] }
    if (!(hi > lo)) { lo = Number.isFinite(lo) ? lo - .5 : 0; hi = lo + 1 } return [lo, hi] }
  const marks = D.findings.filter(f => !f.key || f.key === key.name)
  for (const group of key.groups) {
  const c1 = canvas(box, key.groups.length > 1 ? 110 : 150, (g, w, h) => {
    const [lo, hi] = bounds(group), X = t => LEFT + (w - LEFT - 8) * t / Math.max(1, D.steps - 1), Y = v => h - 16 - (h - 24) * (v - lo) / (hi - lo)
    for (const f of marks) { g.globalAlpha = .2; g.fillStyle = css(shade[f.severity]); g.fillRect(X(f.lo - .5), 4, Math.max(3, X(f.hi - .5) - X(f.lo - .5)), h - 20); g.globalAlpha = 1 }
    g.fillStyle = css('--soft'); g.strokeStyle = css('--line'); g.font = '11px system-ui'; g.textAlign = 'right'
    for (const v of [lo, (lo + hi) / 2, hi]) { g.beginPath(); g.moveTo(LEFT, Y(v)); g.lineTo(w - 8, Y(v)); g.stroke(); g.fillText(short(v), LEFT - 4, Y(v) + 4) }
    for (const k of group) { if (!on[k]) continue
      g.strokeStyle = hue(k, c); g.lineWidth = 1.3; g.beginPath(); let pen = false
      for (let i = 0; i < m; i++) { const v = x[i * c + k]; if (!Number.isFinite(v)) { pen = false; continue }
        pen ? g.lineTo(X(i * key.every), Y(v)) : g.moveTo(X(i * key.every), Y(v)); pen = true }
      g.stroke() }
    g.strokeStyle = css('--ink'); g.lineWidth = 1; g.beginPath(); g.moveTo(X(at), 2); g.lineTo(X(at), h - 14); g.stroke() })
  c1.style.cursor = 'crosshair'
  c1.onpointerdown = c1.onpointermove = e => { if (e.buttons) go((e.offsetX - LEFT) / (c1.clientWidth - LEFT - 8) * (D.steps - 1)) } }
  const legend = document.createElement('div'); legend.className = 'legend'; box.append(legend)
  const values = key.labels.map((label, k) => { const s = document.createElement('button'); s.type = 'button'; s.title = 'show or hide'
    s.innerHTML = '<i></i><span></span> <b></b>'; s.children[1].textContent = label
    s.onclick = e => { if (e.shiftKey) { const only = on.filter(Boolean).length === 1 && on[k]; on.fill(only); on[k] = true } else on[k] = !on[k]; paint() }
    legend.append(s); return s })
  redraw.push(() => values.forEach((s, k) => { s.style.opacity = on[k] ? 1 : .4; s.children[0].style.background = hue(k, c); s.children[2].textContent = short(x[row(at) * c + k]) }))
}

// ---------------------------------------------------------------- paths in the plane and in space
function paths(group) {
  const sets = group.keys.map((k, i) => ({ name: k.name, x: floats(k.values), points: k.points, every: k.every, colour: i }))
  const d = group.dimensions, all = []
  for (const s of sets) for (let i = 0; i < s.x.length; i += d) { const p = s.x.subarray(i, i + d); if (p.every(Number.isFinite)) all.push(p) }
  if (!all.length) return
  const lo = [], hi = []
  for (let a = 0; a < d; a++) { lo[a] = Math.min(...all.map(p => p[a])); hi[a] = Math.max(...all.map(p => p[a])) }
  const middle = lo.map((v, a) => (v + hi[a]) / 2), reach = Math.max(1e-9, ...lo.map((v, a) => hi[a] - v)) * (d === 3 ? .62 : .54)
  let turn = .7, tilt = .5
  const box = card(sets.map(s => s.name).join(', '), d === 3 ? 'drag to turn' : 'second over first component', 'seen')
  const c = canvas(box, 300, (g, w, h) => {
    const scale = Math.min(w, h) / 2 / reach
    const put = p => { const q = Array.from(p, (v, a) => v - middle[a])
      if (d === 2) return [w / 2 + q[0] * scale, h / 2 + (group.down ? 1 : -1) * q[1] * scale]
      const u = q[0] * Math.cos(turn) - q[1] * Math.sin(turn), v = q[0] * Math.sin(turn) + q[1] * Math.cos(turn)
      return [w / 2 + u * scale, h / 2 - (q[2] * Math.cos(tilt) + v * Math.sin(tilt)) * scale] }
    if (d === 3) { g.strokeStyle = css('--line'); g.fillStyle = css('--soft'); g.font = '11px system-ui'
      ;['x', 'y', 'z'].forEach((name, a) => { const tip = lo.slice(); tip[a] = lo[a] + reach / 2; const [p, q] = [put(lo), put(tip)]
        g.beginPath(); g.moveTo(...p); g.lineTo(...q); g.stroke(); g.fillText(name, q[0] + 3, q[1]) }) }
    for (const s of sets) { const m = s.x.length / d / s.points, now = Math.min(m - 1, Math.round(at / s.every)), colour = hue(s.colour, Math.max(2, sets.length))
      for (let k = 0; k < s.points; k++) { const P = i => put(s.x.subarray((i * s.points + k) * d, (i * s.points + k) * d + d))
        const trace = (a, b, alpha, width) => { g.globalAlpha = alpha; g.lineWidth = width; g.strokeStyle = colour; g.beginPath()
          for (let i = a; i <= b; i++) { const [u, v] = P(i); if (Number.isFinite(u)) i === a ? g.moveTo(u, v) : g.lineTo(u, v) } g.stroke(); g.globalAlpha = 1 }
        trace(0, m - 1, .18, 1); trace(Math.max(0, now - Math.round(30 / s.every)), now, .9, 2)
        const [u, v] = P(now); g.fillStyle = colour; g.beginPath(); g.arc(u, v, 4, 0, 7); g.fill() } } })
  const legend = document.createElement('div'); legend.className = 'legend'; box.append(legend)
  if (sets.length > 1) for (const s of sets) { const b = document.createElement('span'); b.innerHTML = '<i></i><span></span>'; b.children[1].textContent = s.name; legend.append(b)
    redraw.push(() => { b.children[0].style.background = hue(s.colour, sets.length) }) }
  if (d === 3) c.onpointermove = e => { if (e.buttons) { turn += e.movementX / 120; tilt = Math.max(-1.5, Math.min(1.5, tilt + e.movementY / 120)); paint() } }
}

// ---------------------------------------------------------------- pictures
function pictures(key) {
  const box = card(key.name, key.note, 'seen'), img = document.createElement('img'); img.alt = key.name; box.append(img)
  redraw.push(() => { let i = 0; while (i + 1 < key.at.length && key.at[i + 1] <= at) i++
    const src = 'data:image/jpeg;base64,' + key.frames[i]; if (img.dataset.i !== String(i)) { img.src = src; img.dataset.i = i } })
}

function findings() {
  for (const f of D.findings) { const li = document.createElement('button'); li.type = 'button'; li.className = 'hit'
    li.style.setProperty('--c', css(shade[f.severity])); li.textContent = `${f.severity} ${f.code} ${f.where}: ${f.steps}`; li.title = f.text; li.onclick = () => go(f.lo); $('hits').append(li) }
  canvas($('strip'), 10, (g, w, h) => { for (const f of [...D.findings].reverse()) { g.fillStyle = css(shade[f.severity])
    g.fillRect(w * f.lo / Math.max(1, D.steps), 0, Math.max(3, w * (f.hi - f.lo) / Math.max(1, D.steps)), h) } })
}

function paint() { for (const draw of redraw) draw()
  $('slider').value = at; $('now').textContent = `step ${at} of ${D.steps - 1}` + (D.fps ? ` · ${(at / D.fps).toFixed(2)} s` : '') }
function go(step) { at = Math.max(0, Math.min(D.steps - 1, Math.round(step))); paint() }
function play() {
  if (timer) { clearInterval(timer); timer = null; $('play').textContent = 'play'; return }
  if (at >= D.steps - 1) at = 0
  let begin = performance.now(), from = at
  $('play').textContent = 'pause'
  timer = setInterval(() => { go(from + (performance.now() - begin) / 1000 * (D.fps || 20) * +$('speed').value); if (at >= D.steps - 1) play() }, 33)
  $('speed').onchange = () => { begin = performance.now(); from = at }
}

D.images.forEach(pictures); D.paths.forEach(paths); D.keys.forEach(lines); findings()
$('slider').max = D.steps - 1; $('slider').oninput = e => go(+e.target.value); $('play').onclick = play
addEventListener('keydown', e => { const by = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 }[e.key]
  if (e.key === ' ') { e.preventDefault(); play() } else if (by) { e.preventDefault(); go(at + by * (e.shiftKey ? 10 : 1)) } })
addEventListener('resize', paint); matchMedia('(prefers-color-scheme:dark)').addEventListener('change', paint)
go(+(location.hash.slice(1) || 0))
