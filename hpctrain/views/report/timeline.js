// The timeline of the report: unpacks the spans, draws them into the image of a Bokeh plot whenever its range changes,
// and shows what is under the pointer. Data: timeline.py and spans.py.
"use strict"
const hpctrainTimeline = (() => {
  const PHASES = 20, MARKS = 18, GAP = 1 // heights of the strips above the rows, and between rows, in CSS pixels
  const COLUMNS = ["gap", "duration", "step", "peer", "bytes"]
  const element = (id) => document.getElementById(id)

  // -- unpacking ----------------------------------------------------------------------------------------------
  async function inflate(base64) {
    const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))
    return new Uint8Array(await new Response(stream).arrayBuffer())
  }

  function fromPlanes(bytes, offset, planes, count, values) {
    for (let plane = 0, factor = 1; plane < planes; plane++, factor *= 256)
      for (let i = 0, at = offset + plane * count; i < count; i++) values[i] += factor * bytes[at + i]
    return values
  }

  async function unpack(row, quantum) {
    const bytes = await inflate(row.data), count = row.count
    const kind = bytes.subarray(0, count), column = {}
    let offset = count
    COLUMNS.forEach((name, i) => {
      const length = name == "gap" ? Math.max(0, count - 1) : count
      column[name] = fromPlanes(bytes, offset, row.planes[i], length, new Float64Array(length))
      offset += row.planes[i] * length
    })
    // Durations come sorted by kind: `next` is where each kind's next one lies.
    const next = new Uint32Array(257)
    for (let i = 0; i < count; i++) next[kind[i] + 1]++
    for (let i = 1; i < 257; i++) next[i] += next[i - 1]
    const start = new Float64Array(count), end = new Float64Array(count), step = column.step
    let now = row.first, number = 0
    for (let i = 0; i < count; i++) {
      if (i) now += column.gap[i - 1]
      start[i] = now * quantum
      now += column.duration[next[kind[i]]++]
      end[i] = now * quantum
      number += step[i] % 2 ? -(step[i] + 1) / 2 : step[i] / 2
      step[i] = number
    }
    return {...row, data: null, kind, start, end, step, peer: column.peer, bytes: column.bytes}
  }

  // -- finding ------------------------------------------------------------------------------------------------
  // The first index whose value is above t; values ascend.
  function above(values, t) {
    let low = 0, high = values.length
    while (low < high) {
      const middle = (low + high) >> 1
      if (values[middle] > t) high = middle
      else low = middle + 1
    }
    return low
  }

  // The ranks of "0-3, 8"; null: all of them.
  function parseRanks(text) {
    const wanted = new Set()
    for (const part of text.split(/[\s,]+/).filter(Boolean)) {
      const match = /^(\d+)(?:-(\d+))?$/.exec(part)
      if (match) for (let r = +match[1]; r <= Math.min(+(match[2] ?? match[1]), +match[1] + 1e5); r++) wanted.add(r)
    }
    return wanted.size ? wanted : null
  }

  // -- drawing ------------------------------------------------------------------------------------------------
  // Time of each kind in each of `width` columns of [from, to), as shares of a column: width x kinds.
  function shares(row, from, to, width, kinds) {
    const sums = new Float32Array(width * kinds), scale = width / (to - from)
    const first = above(row.end, from), last = above(row.start, to)
    for (let i = first; i < last; i++) {
      const kind = Math.min(row.kind[i] - 1, kinds - 1)
      const x0 = Math.max(0, (row.start[i] - from) * scale), x1 = Math.min(width, (row.end[i] - from) * scale)
      let column = Math.floor(x0)
      if (x1 <= column + 1) {
        if (column < width) sums[column * kinds + kind] += x1 - x0
        continue
      }
      sums[column++ * kinds + kind] += 1 - (x0 - Math.floor(x0))
      for (; column + 1 <= x1; column++) sums[column * kinds + kind] += 1
      if (column < width) sums[column * kinds + kind] += x1 - column
    }
    return {sums, first, last}
  }

  // Paints one row, from image line `base` upwards: the kinds of a column stacked, in proportion to their time.
  function paint(row, view, base, height, image) {
    const {width, from, to, colours, order} = view, kinds = colours.length
    const {sums, first, last} = shares(row, from, to, width, kinds)
    for (let column = 0; column < width; column++) {
      let sum = 0, y = 0
      for (const kind of order) {
        const share = sums[column * kinds + kind]
        if (share == 0) continue
        sum += share
        const top = Math.min(height, Math.round(sum * height))
        for (; y < top; y++) image[(base + y) * width + column] = colours[kind]
      }
    }
    if (last - first < width / 8) outline(row, view, first, last, base, height, image)
    return last - first
  }

  // A line at the end of each span that is wide enough: separates spans of one kind in a row.
  function outline(row, {width, from, to}, first, last, base, height, image) {
    const scale = width / (to - from)
    for (let i = first; i < last; i++) {
      const x = Math.floor((row.end[i] - from) * scale)
      if (x < 0 || x >= width || (row.end[i] - row.start[i]) * scale < 5) continue
      for (let y = 0; y < height; y++) image[(base + y) * width + x] = 0xffffffff
    }
  }

  class Timeline {
    constructor(view, data, rows, rowPixels) {
      Object.assign(this, {view, data, all: rows, rows, rowPixels, plot: view.model})
      this.colours = data.colours.map((text) => {
        const [r, g, b] = [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16))
        return (0xff000000 | (b << 16) | (g << 8) | r) >>> 0
      })
      this.source = (name) => this.plot.select_one(name).data_source
      this.layOut()
      const range = this.plot.x_range
      for (const property of [range.properties.start, range.properties.end, this.plot.properties.inner_width])
        property.change.connect(() => this.request())
    }

    // Heights and labels, for the rows that are shown.
    layOut() {
      const {plot, rows, rowPixels} = this, height = rows.length * rowPixels
      const place = (i) => (rows.length - 1 - i + 0.5) * rowPixels
      const every = Math.ceil(12 / rowPixels) // labels need 12 pixels
      const labels = new Map(), hosts = new Set(rows.map((row) => row.node))
      rows.forEach((row, i) => {
        const role = row.role && row.role != "worker" ? ` (${row.role})` : ""
        const node = hosts.size > 1 && (i == 0 || rows[i - 1].node != row.node) ? `node ${row.node} · ` : ""
        if (i % every == 0 || node) labels.set(place(i), node + row.label + role)
      })
      const axis = plot.left[0]
      axis.ticker.ticks = [...labels.keys()]
      axis.major_label_overrides = labels
      const top = height + PHASES + MARKS
      plot.y_range.setv({start: 0, end: top, reset_start: 0, reset_end: top})
      plot.height = top + 70
      this.strips(height)
      this.request()
    }

    strips(height) {
      const {phases, marks} = this.data, right = this.plot.x_range.bounds[1]
      const ends = phases.map((phase) => phase.end ?? right), middle = height + MARKS + PHASES / 2
      this.source("phases").data = {
        left: phases.map((phase) => phase.start), right: ends,
        bottom: phases.map(() => height + MARKS + 2), top: phases.map(() => height + MARKS + PHASES - 1),
        color: phases.map((_, i) => ["#DCE6EE", "#EFE3D0"][i % 2]),
      }
      const later = phases.slice(1)
      this.source("switches").data = {
        x0: later.map((phase) => phase.start), x1: later.map((phase) => phase.start),
        y0: later.map(() => 0), y1: later.map(() => height + MARKS),
      }
      this.source("marks").data = {
        x: marks.events.map((mark) => mark.t), y: marks.events.map(() => height + MARKS / 2),
        marker: marks.events.map((mark) => mark.marker), color: marks.events.map((mark) => mark.colour),
      }
      this.names = {ends, middle}
    }

    // A phase's name stands where the visible part of it begins, if there is room.
    namePhases(from, to, width) {
      const {ends, middle} = this.names, x = [], y = [], text = []
      this.data.phases.forEach((phase, i) => {
        const left = Math.max(phase.start, from), room = ((Math.min(ends[i], to) - left) / (to - from)) * width
        const letters = Math.floor((room - 8) / 6.2)
        if (letters < 3) return
        x.push(left + (4 / width) * (to - from))
        y.push(middle)
        text.push(phase.text.length > letters ? phase.text.slice(0, letters - 1) + "…" : phase.text)
      })
      this.source("names").data = {x, y, text}
    }

    request() {
      if (this.requested) return
      this.requested = true
      requestAnimationFrame(() => {
        this.requested = false
        this.draw()
      })
    }

    draw() {
      const before = performance.now(), {rows, rowPixels} = this
      const {start: from, end: to} = this.plot.x_range, ratio = window.devicePixelRatio || 1
      const inner = this.view.frame.bbox.width
      if (!(inner > 0) || !(to > from)) return
      const width = Math.round(inner * ratio), pixels = Math.round(rowPixels * ratio)
      const height = Math.max(1, rows.length * pixels), painted = new Uint32Array(width * height)
      const view = {width, from, to, colours: this.colours, order: this.data.order}, thick = pixels - Math.round(GAP * ratio)
      let visible = 0
      rows.forEach((row, i) => {
        visible += paint(row, view, (rows.length - 1 - i) * pixels, thick, painted)
      })
      const source = this.source("spans"), NDArray = source.data.image[0].constructor
      source.data = {image: [new NDArray(painted, [height, width])], x: [from], y: [0], dw: [to - from],
        dh: [rows.length * rowPixels]}
      this.namePhases(from, to, inner)
      this.showStatus(visible, visible < (width / 8) * rows.length, (to - from) / inner, performance.now() - before)
    }

    showStatus(visible, single, perPixel, took) {
      const box = element("timeline"), count = visible.toLocaleString("en")
      Object.assign(box.dataset, {visible, drawMs: took.toFixed(1), mode: single ? "spans" : "shares"})
      box.dataset.drawn = +(box.dataset.drawn ?? 0) + 1
      element("timeline-status").textContent = single
        ? `${count} spans in view, drawn one by one`
        : `${count} spans in view: each pixel column, ${seconds(perPixel)} wide, stacks the kinds by their share of time`
    }

    // -- under the pointer --------------------------------------------------------------------------------------
    at(event) {
      const box = this.view.el.getBoundingClientRect(), frame = this.view.frame
      const sx = event.clientX - box.left, sy = event.clientY - box.top
      if (!frame.bbox.contains(sx, sy)) return null
      const t = frame.x_scale.invert(sx), y = frame.y_scale.invert(sy)
      const perPixel = (this.plot.x_range.end - this.plot.x_range.start) / frame.bbox.width
      const height = this.rows.length * this.rowPixels
      if (y > height + MARKS) return this.phaseAt(t)
      if (y > height) return this.markAt(t, perPixel * 8)
      const row = this.rows[this.rows.length - 1 - Math.floor(y / this.rowPixels)]
      return row && this.spanAt(row, t, perPixel)
    }

    phaseAt(t) {
      const i = this.data.phases.findLastIndex((phase) => phase.start <= t)
      if (i < 0 || t > this.names.ends[i]) return null
      const phase = this.data.phases[i]
      return [phase.text, `from ${moment(phase.start)}` + (phase.end == null ? "" : ` to ${moment(phase.end)}`)]
    }

    markAt(t, reach) {
      const near = this.data.marks.events.filter((mark) => Math.abs(mark.t - t) <= reach).slice(0, 6)
      if (!near.length) return null
      return near.flatMap((mark) => {
        const on = mark.ranks.length == 1 ? `rank ${mark.ranks[0]}` : `${mark.ranks.length} ranks`
        return [`${mark.kind} at ${moment(mark.t)}, ${on}`, mark.text]
      })
    }

    spanAt(row, t, perPixel) {
      const from = t - perPixel / 2, to = t + perPixel / 2, head = row.label + (row.host ? ` on ${row.host}` : "")
      const first = above(row.end, from), last = above(row.start, to)
      if (last - first > 3) return [head, ...this.mixture(row, from, to), `around ${moment(t)}`]
      const i = above(row.end, t)
      if (i >= row.kind.length || row.start[i] > t) return [head, `nothing traced at ${moment(t)}`]
      const lines = [head, `${this.kind(row.kind[i])}: ${seconds(row.end[i] - row.start[i])}`]
      if (row.step[i] >= 0) lines.push(`step ${row.step[i]}`)
      if (row.peer[i] > 0) lines.push(`with rank ${row.peer[i] - 1}`)
      if (row.bytes[i] > 0) lines.push(`${row.bytes[i].toLocaleString("en")} bytes`)
      return [...lines, `began at ${moment(row.start[i])}`]
    }

    mixture(row, from, to) {
      const {sums} = shares(row, from, to, 1, this.colours.length)
      return [...sums].map((share, kind) => [share, kind]).filter(([share]) => share > 0.005)
        .sort((a, b) => b[0] - a[0]).map(([share, kind]) => `${Math.round(100 * share)} % ${this.data.kinds[kind]}`)
    }

    kind(code) {
      return this.data.kinds[code - 1] ?? `kind ${code}`
    }
  }

  function seconds(s) {
    const [factor, unit] = s >= 1 ? [1, "s"] : s >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"]
    return `${+(s * factor).toPrecision(4)} ${unit}`
  }

  const moment = (s) => `${+s.toFixed(6)} s`

  function showUnderPointer(timeline, box) {
    const tip = element("timeline-tip")
    const move = (event) => {
      const lines = timeline.at(event)
      tip.hidden = !lines
      if (!lines) return
      tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), {textContent: line})))
      const around = box.getBoundingClientRect(), left = event.clientX - around.left
      tip.style.left = `${Math.min(left + 14, around.width - tip.offsetWidth - 4)}px`
      tip.style.top = `${event.clientY - around.top + 16}px`
    }
    box.addEventListener("pointermove", move)
    box.addEventListener("pointerdown", move)
    box.addEventListener("pointerleave", () => { tip.hidden = true })
  }

  async function begin() {
    const box = element("timeline"), {plot, data, rowPixels} = JSON.parse(element("timeline-data").textContent)
    try {
      const [manager, ...rows] = await Promise.all([
        Bokeh.embed.embed_item(plot, "timeline-plot"), ...data.rows.map((row) => unpack(row, data.quantum))])
      const timeline = new Timeline(manager.roots[0], data, rows, rowPixels)
      showUnderPointer(timeline, box)
      element("timeline-ranks").addEventListener("input", (event) => {
        const wanted = parseRanks(event.target.value)
        const shown = rows.filter((row) => !wanted || wanted.has(row.rank))
        timeline.rows = shown.length ? shown : rows
        timeline.layOut()
      })
      return timeline
    } catch (error) {
      element("timeline-status").textContent = `This browser cannot show the timeline (${error}).`
      throw error
    }
  }

  return {begin}
})()
hpctrainTimeline.begin()
