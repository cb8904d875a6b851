//! The displayed formulas of the book, as MathML with plain text behind each.

use pulldown_latex::config::DisplayMode;
use pulldown_latex::mathml::push_mathml;
use pulldown_latex::{Parser, RenderConfig, Storage};

/// A file's name, the formula in LaTeX, and what a reader without MathML gets.
const FORMULAS: [(&str, &str, &str); 8] = [
    (
        "frames",
        r"a_k = U_k \sqrt{\Sigma_k} \in \mathbb{R}^{d_\mathrm{input} \times r}, \qquad
          b_k = \sqrt{\Sigma_k}\, V_k^\top \in \mathbb{R}^{r \times d_\mathrm{output}}",
        "a_k = U_k √Σ_k, of shape [d_input, r], and b_k = √Σ_k V_kᵀ, of shape [r, d_output]",
    ),
    (
        "forward",
        r"y = x \left( W + s \left( a_k b_k - \operatorname{stopgradient}(a_k b_k) \right) \right)",
        "y = x · (W + s·(a_k·b_k − stopgradient(a_k·b_k)))",
    ),
    (
        "gradients",
        r"\begin{aligned}
            \frac{\partial L}{\partial x} &= G\, W^\top \\
            \frac{\partial L}{\partial a_k} &= s\; x^\top \left( G\, b_k^\top \right) \\
            \frac{\partial L}{\partial b_k} &= s \left( x\, a_k \right)^\top G
          \end{aligned}",
        "∂L/∂x = G·Wᵀ; ∂L/∂a_k = s·xᵀ·(G·b_kᵀ); ∂L/∂b_k = s·(x·a_k)ᵀ·G",
    ),
    (
        "step",
        r"W \mathrel{{+}{=}} \sum_{k=0}^{K-1} \left( a_k\, \Delta b_k + \Delta a_k\, b_k
          + \Delta a_k\, \Delta b_k \right)",
        "W += Σ_k (a_k·Δb_k + Δa_k·b_k + Δa_k·Δb_k)",
    ),
    (
        "one_product",
        r"W \mathrel{{+}{=}} \begin{bmatrix} a + \Delta a & \Delta a \end{bmatrix}
          \begin{bmatrix} \Delta b \\ b \end{bmatrix}",
        "W += [a + Δa | Δa] · [Δb ; b]",
    ),
    (
        "first_order",
        r"\sum_k U_k X_k + Y_k V_k^\top = U X + Y V^\top, \qquad
          X \in \mathbb{R}^{m \times d_\mathrm{output}},\;
          Y \in \mathbb{R}^{d_\mathrm{input} \times m}",
        "Σ_k U_k·X_k + Y_k·V_kᵀ = U·X + Y·Vᵀ with X [m, d_output] and Y [d_input, m]",
    ),
    (
        "within_reach",
        r"P_U\, D + (1 - P_U)\, D\, P_V",
        "P_U·D + (1 − P_U)·D·P_V",
    ),
    (
        "out_of_reach",
        r"(1 - P_U)\, D\, (1 - P_V)",
        "(1 − P_U)·D·(1 − P_V)",
    ),
];

/// The names of the formulas' files, without the ending, and what is in them.
///
/// # Panics
///
/// If a formula is not LaTeX.
pub fn all() -> impl Iterator<Item = (&'static str, String)> {
    FORMULAS.into_iter().map(|(name, latex, plain)| {
        let storage = Storage::new();
        let config = RenderConfig {
            display_mode: DisplayMode::Block,
            ..Default::default()
        };
        let mut text = String::new();
        push_mathml(&mut text, Parser::new(latex, &storage), config)
            .expect("writing to a string succeeds");
        assert!(!text.contains("merror"), "{name}: {text}");
        let math = text.replacen("<math ", &format!("<math alttext=\"{plain}\" "), 1);
        (name, format!("<div class=\"formula\">{math}</div>\n"))
    })
}
