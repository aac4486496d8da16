//! How lm-evaluation-harness (0.4.13) puts the published data sets into words. It is written in
//! Python, whose notions of a space and of a capital letter these follow.

/// ARC's and PIQA's query.
pub fn question_answer(question: &str) -> String {
    format!("Question: {question}\nAnswer:")
}

/// HellaSwag's clean-up: bracketed marks of WikiHow go, a title's becomes a full stop.
pub fn without_brackets(text: &str) -> String {
    let text = text.trim_matches(is_python_space).replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    // The regular expression \[.*?\], whose dot is no line break.
    while let Some(open) = rest.find('[') {
        let end = rest[open..].find([']', '\n']).map(|len| open + len);
        match end.filter(|end| rest[*end..].starts_with(']')) {
            Some(close) => {
                kept.push_str(&rest[..open]);
                rest = &rest[close + 1..];
            }
            None => {
                kept.push_str(&rest[..=open]);
                rest = &rest[open + 1..];
            }
        }
    }
    kept.push_str(rest);
    kept.replace("  ", " ")
}

/// Python's `str.capitalize`: the first character in upper case (Python: title case, which differs
/// for a few ligatures), all others in lower case.
pub fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(char::to_uppercase);
    let first: String = first.into_iter().flatten().collect();
    first + &chars.as_str().to_lowercase()
}

/// What Python's `str.strip` takes away.
pub fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}
