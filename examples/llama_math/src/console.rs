//! Lines for people. A closed terminal or a full disk behind it does not end a run.

/// Prints a line on standard output, if that is still open.
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::console::line(&mut std::io::stdout(), format_args!($($argument)*))
    };
}

/// Prints a line on standard error, if that is still open.
macro_rules! complain {
    ($($argument:tt)*) => {
        $crate::console::line(&mut std::io::stderr(), format_args!($($argument)*))
    };
}

pub(crate) use {complain, say};

pub(crate) fn line(to: &mut impl std::io::Write, text: std::fmt::Arguments<'_>) {
    // Written in one piece, so the lines of several processes do not mix.
    let _ = to.write_all(format!("{text}\n").as_bytes());
    let _ = to.flush();
}
