//! One page that needs nothing but a browser.

use std::fmt::Write;

use anyhow::Result;

use super::grid::Grid;
use super::report::Report;
use super::svg::{drawing, escaped};
use crate::survey::ratio;
use crate::text::{bytes, percent};

const STYLE: &str = "\
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1120px;padding:0 1rem;color:#222}\
h1{font-size:1.3rem;overflow-wrap:anywhere}h2{font-size:1.05rem;margin-top:2rem}\
.cards{display:flex;flex-wrap:wrap;gap:.6rem}\
.cards div{border:1px solid #ddd;border-radius:6px;padding:.5rem .8rem}\
.cards b{display:block;font-size:1.15rem}\
.warn{background:#fff3cd;padding:.6rem;border-radius:6px}\
table{border-collapse:collapse;font-size:12px;width:100%}\
th,td{padding:2px 8px;text-align:right;white-space:nowrap}\
th{position:sticky;top:0;background:#fff;border-bottom:1px solid #999;cursor:pointer}\
td:nth-child(2),th:nth-child(2){text-align:left;max-width:360px;overflow:hidden;text-overflow:ellipsis}\
tr:nth-child(even){background:#f7f7f7}\
.bar{background:#277f8e;height:12px;display:inline-block;min-width:1px}\
.hist td:last-child{text-align:left;width:50%}\
svg{max-width:100%;height:auto}\
#tip{position:fixed;background:#222;color:#fff;padding:.2rem .5rem;border-radius:4px;font-size:12px;display:none;pointer-events:none}\
.scroll{max-height:70vh;overflow:auto}";

/// Sorts the table by the column clicked; says what is under the pointer.
const SCRIPT: &str = "\
document.querySelectorAll('#layers th').forEach((th,i)=>th.onclick=()=>{\
const b=document.querySelector('#layers tbody'),d=th.dataset.d=th.dataset.d==='1'?'-1':'1';\
[...b.rows].sort((x,y)=>{const a=x.cells[i].dataset.v??x.cells[i].textContent,c=y.cells[i].dataset.v??y.cells[i].textContent;\
return d*((isNaN(a)||isNaN(c))?a.localeCompare(c):a-c)}).forEach(r=>b.append(r))});\
const box=document.getElementById('boxes'),tip=document.getElementById('tip');\
box.style.pointerEvents='all';\
box.onmousemove=e=>{const r=box.getBoundingClientRect(),row=Math.min(grid.rows-1,Math.floor((e.clientY-r.top)/r.height*grid.rows)),\
at=(e.clientX-r.left)/r.width*grid.disk,from=row*grid.per,to=Math.min(from+grid.per,names.length)-1;\
tip.textContent=(from===to?'depth '+from+': '+names[from]:'depth '+from+' to '+to)+', at '+(at/2**30).toFixed(2)+' GiB';\
tip.style.display='block';tip.style.left=Math.min(e.clientX+14,innerWidth-320)+'px';tip.style.top=e.clientY+14+'px'};\
box.onmouseleave=()=>tip.style.display='none';";

/// The page.
pub fn page(grid: &Grid, report: &Report) -> Result<String> {
    let mut out = String::new();
    let title = escaped(&report.image);
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    if let Some(problem) = &report.end.problem {
        let _ = writeln!(
            out,
            "<p class=\"warn\">The chain ends early: {}</p>",
            escaped(problem)
        );
    }
    cards(&mut out, report);
    out.push_str("<h2>Layers over the disk</h2>\n");
    out.push_str(&drawing(grid, report));
    histogram(&mut out, report);
    layers(&mut out, report);
    let names: Vec<_> = report.layers.iter().map(|layer| &layer.name).collect();
    let grid = serde_json::json!({
        "rows": grid.rows, "per": grid.layers_per_row, "disk": report.disk_size,
    });
    // Nothing that ends the element or begins another one.
    let names = serde_json::to_string(&names)?.replace('<', "\\u003c");
    let _ = write!(
        out,
        "<div id=\"tip\"></div><script>const grid={grid},names={names};{SCRIPT}</script>\n</body></html>\n"
    );
    Ok(out)
}

fn cards(out: &mut String, report: &Report) {
    let totals = &report.totals;
    let shadowed = ratio(totals.shadowed_bytes, totals.data_bytes);
    let cards = [
        ("layers", report.depth.to_string()),
        ("disk", bytes(report.disk_size)),
        ("files", bytes(totals.file_bytes)),
        ("data", bytes(totals.data_bytes)),
        ("visible", bytes(totals.visible_bytes)),
        (
            "shadowed",
            format!("{} ({})", bytes(totals.shadowed_bytes), percent(shadowed)),
        ),
        ("tables", bytes(totals.table_bytes)),
        ("mean depth of data", format!("{:.1}", report.mean_depth)),
    ];
    out.push_str("<div class=\"cards\">");
    for (name, value) in cards {
        let _ = write!(out, "<div>{name}<b>{value}</b></div>");
    }
    out.push_str("</div>\n");
}

fn histogram(out: &mut String, report: &Report) {
    out.push_str(
        "<h2>Depth at which reads are served</h2>\n<table class=\"hist\"><thead><tr><th>depth</th>\
         <th style=\"text-align:right\">data</th><th>zeroes</th><th>share</th><th></th></tr></thead><tbody>\n",
    );
    let mut row = |depth: String, data: u64, zero: u64, share: f64| {
        let _ = writeln!(
            out,
            "<tr><td>{depth}</td><td style=\"text-align:right\">{}</td><td>{}</td><td>{}</td>\
             <td><span class=\"bar\" style=\"width:{:.1}%\"></span></td></tr>",
            bytes(data),
            bytes(zero),
            percent(share),
            share * 100.0
        );
    };
    for class in &report.served_by_depth {
        let depth = if class.from == class.to {
            class.from.to_string()
        } else {
            format!("{} to {}", class.from, class.to)
        };
        row(depth, class.data_bytes, class.zero_bytes, class.share);
    }
    let share = ratio(report.hole_bytes, report.disk_size);
    row("nowhere".into(), 0, report.hole_bytes, share);
    out.push_str("</tbody></table>\n");
}

fn layers(out: &mut String, report: &Report) {
    out.push_str(
        "<h2>Layers</h2>\n<div class=\"scroll\"><table id=\"layers\"><thead><tr><th>depth</th>\
         <th>file</th><th>format</th><th>file size</th><th>disk</th><th>data</th><th>visible</th>\
         <th>shadowed</th><th>zeroes</th><th>tables</th><th>fragments</th><th>compressed</th></tr>\
         </thead><tbody>\n",
    );
    for layer in &report.layers {
        let figures = &layer.figures;
        let _ = write!(
            out,
            "<tr><td>{}</td><td title=\"{}\">{}</td><td>{}</td>",
            layer.depth,
            escaped(&layer.file),
            escaped(&layer.name),
            escaped(&layer.format)
        );
        let sizes = [
            layer.file_bytes,
            layer.disk_size.unwrap_or(0),
            figures.data_bytes,
            figures.visible_bytes,
            figures.shadowed_bytes,
            figures.zero_bytes,
            figures.table_bytes,
        ];
        for size in sizes {
            let _ = write!(out, "<td data-v=\"{size}\">{}</td>", bytes(size));
        }
        let _ = writeln!(
            out,
            "<td data-v=\"{}\">{}</td><td>{}</td></tr>",
            figures.fragmentation,
            percent(figures.fragmentation),
            figures.compressed_clusters
        );
    }
    out.push_str("</tbody></table></div>\n");
}
