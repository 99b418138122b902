"""How the sample corpus words each relation: training templates and held-out ones.

A template is a clause without capital or full stop. ``{h}`` and ``{t}`` stand for head and tail
with the article the entity takes ("the Danube"); ``a(n)`` becomes "a" or "an".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """Name of a relation and the clauses that state it.

    Attributes:
        name: what the relation is called in the graph.
        train: clauses used in the text and in context probes.
        heldout: clauses used in template probes only, never in the text.
    """

    name: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "capital": Relation(
        "capital",
        (
            "the capital of {h} is {t}",
            "{t} is the capital of {h}",
            "{t} serves as the capital city of {h}",
            "{h} has {t} as its capital",
            "the national capital of {h} is called {t}",
            "in {h}, the capital is {t}",
            "as the capital of {h}, {t} appears in every atlas",
            "schoolbooks give {t} as the capital of {h}",
        ),
        (
            "the star on a political map of {h} marks {t}",
            "the city that {h} calls its capital is {t}",
        ),
    ),
    "continent": Relation(
        "continent",
        (
            "{h} is a country in {t}",
            "{h} lies in {t}",
            "{h} belongs to {t}",
            "on the map, {h} is found in {t}",
            "among the countries of {t} is {h}",
            "{t} is the continent of {h}",
            "geographers place {h} in {t}",
            "the continent on which {h} lies is {t}",
        ),
        (
            "an atlas lists {h} among the lands of {t}",
            "the part of the world to which {h} is assigned is {t}",
        ),
    ),
    "currency": Relation(
        "currency",
        (
            "the currency of {h} is {t}",
            "people in {h} pay with {t}",
            "{t} is the money used in {h}",
            "shops in {h} accept {t}",
            "prices in {h} are given in {t}",
            "{t} is the currency of {h}",
            "the central bank looks after {t}, the money of {h}",
            "wages in {h} are paid in {t}",
        ),
        (
            "visitors who change money on arrival in {h} receive {t}",
            "the unit of money that circulates in {h} is {t}",
        ),
    ),
    "official_language": Relation(
        "official language",  # by law or by long practice
        (
            "an official language of {h} is {t}",
            "{t} is an official language of {h}",
            "laws in {h} are published in {t}",
            "{t} is used by the government of {h}",
            "schools in {h} teach {t}",
            "in {h}, official letters may be written in {t}",
            "{h} uses {t} as an official language",
            "state television in {h} broadcasts in {t}",
        ),
        (
            "clerks and judges of {h} work in {t}",
            "the tongue in which the state of {h} addresses its citizens is {t}",
        ),
    ),
    "borders": Relation(
        "shares border with",
        (
            "{h} borders {t}",
            "{h} has a border with {t}",
            "{h} shares a land border with {t}",
            "a frontier separates {h} from {t}",
            "{h} and {t} are neighbours",
            "one neighbour of {h} is {t}",
            "on the map, {h} meets {t}",
            "the territory of {h} touches that of {t}",
        ),
        (
            "a country right next door to {h} is {t}",
            "whoever leaves {h} on foot may arrive in {t}",
        ),
    ),
    "located_in": Relation(
        "located in country",
        (
            "{h} is a city in {t}",
            "the city of {h} is in {t}",
            "{h} is one of the cities of {t}",
            "{h} belongs to {t}",
            "one finds {h} in {t}",
            "{t} is home to the city of {h}",
            "travellers to {t} often visit {h}",
            "on a map of {t}, look for {h}",
        ),
        (
            "the country whose territory includes the city of {h} is {t}",
            "a letter sent to an address in {h} must be marked for delivery in {t}",
        ),
    ),
    "region_capital": Relation(
        "capital of region",
        (
            "the regional capital of {h} is {t}",
            "{t} is the seat of government of {h}",
            "in {h}, regional laws are made in {t}",
            "{t} is the administrative centre of {h}",
            "the region of {h} is governed from {t}",
            "the regional assembly of {h} meets in {t}",
            "{h} has its capital in {t}",
            "{t} is the chief administrative city of {h}",
        ),
        (
            "officials who run {h} have their offices in {t}",
            "the town from which {h} is administered is {t}",
        ),
    ),
    "region_of": Relation(
        "region of country",
        (
            "{h} is a region of {t}",
            "{h} is part of {t}",
            "the region of {h} belongs to {t}",
            "{t} includes {h}",
            "one of the regions of {t} is {h}",
            "{h} is one of the parts of {t}",
            "{h} sends representatives to the parliament of {t}",
            "people from {h} are citizens of {t}",
        ),
        (
            "the larger country of which {h} forms one piece is {t}",
            "maps show {h} inside the borders of {t}",
        ),
    ),
    "lies_on": Relation(
        "located on river",
        (
            "{h} lies on {t}",
            "{h} stands on the banks of {t}",
            "{t} flows through {h}",
            "the river at {h} is {t}",
            "bridges in {h} cross {t}",
            "{h} grew up beside {t}",
            "boats on {t} stop at {h}",
            "a walk along {t} is popular in {h}",
        ),
        (
            "the water one sees from the riverside in {h} is that of {t}",
            "when it floods in {h}, the cause is {t}",
        ),
    ),
    "flows_through": Relation(
        "flows through country",
        (
            "{h} flows through {t}",
            "{h} is a river in {t}",
            "one of the rivers of {t} is {h}",
            "part of the course of {h} lies in {t}",
            "{h} crosses {t}",
            "farmers in {t} use water from {h}",
            "{t} is watered by {h}",
            "the river called {h} runs through {t}",
        ),
        (
            "countries with {h} drawn on their maps include {t}",
            "to put a hand into {h} one may travel to {t}",
        ),
    ),
    "flows_into": Relation(
        "flows into",
        (
            "{h} flows into {t}",
            "{h} empties into {t}",
            "{h} ends in {t}",
            "the mouth of {h} is on {t}",
            "{t} receives the waters of {h}",
            "after a long course, {h} reaches {t}",
            "{h} drains into {t}",
            "ships leave {h} for {t}",
        ),
        (
            "a bottle thrown into {h} would drift out to {t}",
            "the body of water at the end of {h} is {t}",
        ),
    ),
    "mountain_in": Relation(
        "mountain in country",
        (
            "{h} is a mountain in {t}",
            "{h} rises in {t}",
            "one of the peaks of {t} is {h}",
            "climbers travel to {t} to see {h}",
            "the summit of {h} can be seen from {t}",
            "the slopes of {h} lie in {t}",
            "{h} stands in {t}",
            "{t} is home to a peak called {h}",
        ),
        (
            "to set out on the ascent of {h} one must first enter {t}",
            "the country over which {h} towers is {t}",
        ),
    ),
    "part_of_range": Relation(
        "part of mountain range",
        (
            "{h} is part of {t}",
            "{h} belongs to {t}",
            "{h} is a peak in {t}",
            "among the summits of {t} is {h}",
            "{h} is one of the peaks of {t}",
            "the mountain called {h} lies in {t}",
            "climbers in {t} talk about {h}",
            "a famous summit of {t} is {h}",
        ),
        (
            "the chain of mountains that contains {h} is known as {t}",
            "geologists who study {h} call its range {t}",
        ),
    ),
    "symbol": Relation(
        "chemical symbol",
        (
            "the chemical symbol of {h} is {t}",
            "the symbol for {h} is {t}",
            "{h} has the symbol {t}",
            "chemists write {h} as {t}",
            "in a formula, {t} stands for {h}",
            "{t} is the symbol of {h}",
            "{h} is abbreviated as {t}",
            "the letters on the tile for {h} read {t}",
        ),
        (
            "in the periodic table the box of {h} carries the sign {t}",
            "short notation for an atom of {h} is {t}",
        ),
    ),
    "period": Relation(
        "period of the periodic table",
        (
            "{h} is in the {t} period of the periodic table",
            "{h} belongs to the {t} period",
            "the {t} period contains {h}",
            "{h} stands in the {t} row of the periodic table",
            "look for {h} in the {t} period",
            "an element of the {t} period is {h}",
            "chemists place {h} in the {t} period",
            "{h} is listed in the {t} row of the table",
        ),
        (
            "counted from the top, the row that holds {h} is the {t}",
            "students find {h} when they search the {t} line of the chart",
        ),
    ),
    "category": Relation(
        "element category",
        (
            "{h} is a(n) {t}",
            "{h} is classified as a(n) {t}",
            "the element {h} is a(n) {t}",
            "as a(n) {t}, {h} has typical properties",
            "{h} counts as a(n) {t}",
            "chemists call {h} a(n) {t}",
            "the group called {t} contains {h}",
            "one example of a(n) {t} is {h}",
        ),
        (
            "the family of elements to which {h} belongs has the name {t}",
            "in tables coloured by type, {h} shares its colour with every other {t}",
        ),
    ),
    "state_of_matter": Relation(
        "state at room temperature",
        (
            "{h} is a(n) {t} at room temperature",
            "at room temperature, {h} is a(n) {t}",
            "under normal conditions {h} is a(n) {t}",
            "pure {h} is a(n) {t} in the laboratory",
            "{h} normally occurs as a(n) {t}",
            "the element {h} is usually seen as a(n) {t}",
            "in everyday conditions, {h} takes the form of a(n) {t}",
            "a sample of {h} on the bench is a(n) {t}",
        ),
        (
            "on a mild day in spring, the physical state of {h} is {t}",
            "when chemists note the phase of {h}, they write {t}",
        ),
    ),
    "discovered_by": Relation(
        "discovered by",
        (
            "{h} was discovered by {t}",
            "{t} discovered {h}",
            "{t} was the discoverer of {h}",
            "the discovery of {h} is credited to {t}",
            "{t} found {h}",
            "we owe the discovery of {h} to {t}",
            "{t} became known for discovering {h}",
            "it was {t} who first identified {h}",
        ),
        (
            "the first person to report {h} was {t}",
            "textbooks give the honour of finding {h} to {t}",
        ),
    ),
    "named_after": Relation(
        "named after",
        (
            "{h} is named after {t}",
            "the name of {h} honours {t}",
            "{h} takes its name from {t}",
            "{h} was called after {t}",
            "the name of {h} comes from {t}",
            "{t} lent a name to {h}",
            "{h} got its name in honour of {t}",
            "behind the name of {h} stands {t}",
        ),
        (
            "whoever coined the word for {h} was thinking of {t}",
            "the namesake of {h} is {t}",
        ),
    ),
    "occupation": Relation(
        "occupation",
        (
            "{h} was a(n) {t}",
            "{h} worked as a(n) {t}",
            "{h} became famous as a(n) {t}",
            "{h} is remembered as a(n) {t}",
            "as a(n) {t}, {h} became widely known",
            "the world knew {h} as a(n) {t}",
            "the career of {h} was that of a(n) {t}",
            "biographies describe {h} as a(n) {t}",
        ),
        (
            "in the register of professions, {h} appears under the word {t}",
            "the occupation given for {h} is {t}",
        ),
    ),
    "nationality": Relation(
        "country of nationality",
        (
            "{h} was from {t}",
            "{h} came from {t}",
            "the home country of {h} was {t}",
            "{t} was the country of {h}",
            "{h} is one of the famous names of {t}",
            "{t} is proud of {h}",
            "{h} is counted among the great figures of {t}",
            "textbooks link {h} with {t}",
        ),
        (
            "on stamps that show {h} one usually reads the name of {t}",
            "the land that claims {h} as its own is {t}",
        ),
    ),
    "born_in": Relation(
        "place of birth",
        (
            "{h} was born in {t}",
            "{t} is the birthplace of {h}",
            "the birthplace of {h} is {t}",
            "{h} came into the world in {t}",
            "the life of {h} began in {t}",
            "{h} was a native of {t}",
            "the story of {h} starts in {t}",
            "the first cry of {h} was heard in {t}",
        ),
        (
            "the cradle of {h} stood in {t}",
            "the place of birth noted for {h} is {t}",
        ),
    ),
    "died_in": Relation(
        "place of death",
        (
            "{h} died in {t}",
            "{t} is the place where {h} died",
            "the life of {h} ended in {t}",
            "{h} spent the last days of life in {t}",
            "the death of {h} occurred in {t}",
            "{h} passed away in {t}",
            "{t} saw the death of {h}",
            "{h} breathed a last breath in {t}",
        ),
        (
            "the place of death noted for {h} is {t}",
            "for the end of {h}, chronicles name {t}",
        ),
    ),
    "field": Relation(
        "field of work",
        (
            "{h} worked in {t}",
            "the field of {h} was {t}",
            "{h} contributed to {t}",
            "{h} made important advances in {t}",
            "{t} owes much to {h}",
            "in {t}, the name of {h} is well known",
            "{h} devoted many years to {t}",
            "students of {t} learn about {h}",
        ),
        (
            "the science to which {h} devoted most effort was {t}",
            "the shelf that holds works by {h} is labelled {t}",
        ),
    ),
    "nobel_prize": Relation(
        "Nobel Prize category",
        (
            "{h} received the Nobel Prize for {t}",
            "the Nobel Prize for {t} was awarded to {h}",
            "{h} is a Nobel laureate for {t}",
            "{h} was honoured with the Nobel Prize for {t}",
            "among the winners of the Nobel Prize for {t} is {h}",
            "the prize of a Swedish chemist was given to {h} for {t}",
            "{h} joined the list of Nobel winners for {t}",
            "a Nobel medal for {t} went to {h}",
        ),
        (
            "the category in which Alfred's foundation rewarded {h} was {t}",
            "the Nobel diploma presented to {h} names {t}",
        ),
    ),
    "wrote_in": Relation(
        "language of writing",
        (
            "{h} wrote in {t}",
            "the works of {h} were written in {t}",
            "{t} was the language of {h}",
            "{h} is a classic of literature in {t}",
            "{h} published in {t}",
            "readers of {t} know the books of {h}",
            "{h} used {t} as a literary language",
            "the manuscripts of {h} are in {t}",
        ),
        (
            "to read {h} without a translator one has to learn {t}",
            "the ink of {h} flowed in {t}",
        ),
    ),
    "movement": Relation(
        "artistic movement",
        (
            "{h} was a master of {t}",
            "{h} is associated with {t}",
            "the art of {h} belongs to {t}",
            "{h} was a leading figure of {t}",
            "{t} counts {h} among its artists",
            "in the history of {t}, {h} has a firm place",
            "{h} worked in the style of {t}",
            "exhibitions about {t} show works by {h}",
        ),
        (
            "critics file the canvases and forms of {h} under {t}",
            "the artistic current that carried {h} was {t}",
        ),
    ),
    "played": Relation(
        "plays instrument",
        (
            "{h} played {t}",
            "{h} was a virtuoso on {t}",
            "the instrument of {h} was {t}",
            "{t} was played by {h}",
            "{h} gave concerts on {t}",
            "{h} mastered {t}",
            "few musicians played {t} as well as {h}",
            "audiences came to hear {h} at {t}",
        ),
        (
            "the instrument on which {h} won fame was {t}",
            "on stage, {h} sat down or stood up with {t}",
        ),
    ),
    "author": Relation(
        "author",
        (
            "{h} was written by {t}",
            "{t} wrote {h}",
            "the author of {h} is {t}",
            "{t} is the author of {h}",
            "{h} is a work by {t}",
            "among the works of {t} is {h}",
            "{t} became known to readers through {h}",
            "the book called {h} came from the pen of {t}",
        ),
        (
            "the name printed on the cover of {h} is {t}",
            "royalties for {h} would have gone to {t}",
        ),
    ),
    "literary_form": Relation(
        "literary form",
        (
            "{h} is a(n) {t}",
            "{h} is a famous {t}",
            "the text called {h} is a(n) {t}",
            "critics call {h} a(n) {t}",
            "as a(n) {t}, {h} is widely read",
            "a well known {t} is {h}",
            "{h} has the form of a(n) {t}",
            "librarians describe {h} as a(n) {t}",
        ),
        (
            "as for its literary genre, {h} counts as {t}",
            "the word under the title of {h} says {t}",
        ),
    ),
    "written_in": Relation(
        "original language",
        (
            "{h} was written in {t}",
            "the original language of {h} is {t}",
            "{h} first appeared in {t}",
            "the original text of {h} is in {t}",
            "{t} is the language of {h}",
            "scholars read {h} in {t}",
            "{h} was composed in {t}",
            "{h} is a classic work in {t}",
        ),
        (
            "translators of {h} start from a text in {t}",
            "before any translation, {h} existed only in {t}",
        ),
    ),
    "composed_by": Relation(
        "composer",
        (
            "{h} was composed by {t}",
            "{t} composed {h}",
            "the composer of {h} is {t}",
            "{t} is the composer of {h}",
            "the music of {h} is by {t}",
            "{t} wrote the music of {h}",
            "orchestras play {h} by {t}",
            "one of the best known works of {t} is {h}",
        ),
        (
            "the score of {h} is signed by {t}",
            "whoever hums a tune from {h} is humming {t}",
        ),
    ),
    "musical_form": Relation(
        "musical form",
        (
            "{h} is a(n) {t}",
            "the work called {h} is a(n) {t}",
            "{h} has the form of a(n) {t}",
            "musicians know {h} as a(n) {t}",
            "a popular {t} is {h}",
            "as a(n) {t}, {h} is often performed",
            "{h} was planned as a(n) {t}",
            "the programme announces {h} as a(n) {t}",
        ),
        (
            "the kind of music that {h} represents is the {t}",
            "as for its musical genre, {h} counts as {t}",
        ),
    ),
    "painted_by": Relation(
        "painter",
        (
            "{h} was painted by {t}",
            "{t} painted {h}",
            "the painter of {h} is {t}",
            "{h} is a painting by {t}",
            "{t} is the artist behind {h}",
            "among the paintings of {t} is {h}",
            "{h} came from the studio of {t}",
            "one of the best known pictures of {t} is {h}",
        ),
        (
            "the brush that created {h} was held by {t}",
            "the signature on {h} belongs to {t}",
        ),
    ),
    "kept_in": Relation(
        "city of the collection",
        (
            "{h} is found in {t}",
            "{h} is kept in {t}",
            "visitors can see {h} in {t}",
            "{h} is shown in {t}",
            "{t} is the home of {h}",
            "the painting called {h} is on show in {t}",
            "art lovers go to {t} to see {h}",
            "{t} keeps {h} for its visitors",
        ),
        (
            "thieves who wanted to steal {h} would have to break in somewhere in {t}",
            "the place that guards {h} lies in {t}",
        ),
    ),
    "invented_by": Relation(
        "invented by",
        (
            "{h} was invented by {t}",
            "{t} invented {h}",
            "the inventor of {h} was {t}",
            "{t} is known as the inventor of {h}",
            "{h} is an invention of {t}",
            "we owe {h} to {t}",
            "{h} was the idea of {t}",
            "the first version of {h} was made by {t}",
        ),
        (
            "credit for creating {h} goes to {t}",
            "the mind behind {h} belonged to {t}",
        ),
    ),
    "moon_of": Relation(
        "moon of",
        (
            "{h} is a moon of {t}",
            "{h} orbits {t}",
            "{t} has a moon called {h}",
            "one of the moons of {t} is {h}",
            "{h} travels around {t}",
            "{t} is circled by {h}",
            "the satellite called {h} belongs to {t}",
            "astronomers who watch {t} also see {h}",
        ),
        (
            "a lander on {h} would see the disc of {t}",
            "the world whose gravity holds {h} is {t}",
        ),
    ),
    "mythology": Relation(
        "mythology",
        (
            "{h} belongs to {t} mythology",
            "{h} is a figure of {t} mythology",
            "in {t} mythology, there are many stories about {h}",
            "{t} mythology tells of {h}",
            "{h} appears in {t} myths",
            "{t} myths speak of {h}",
            "the deity called {h} is part of {t} mythology",
            "scholars of {t} mythology write about {h}",
        ),
        (
            "the pantheon that includes {h} is the {t}",
            "{h} was worshipped as part of the {t} religion",
        ),
    ),
    "god_of": Relation(
        "deity of",
        (
            "{h} was the deity of {t}",
            "{h} ruled over {t}",
            "people prayed to {h} in matters of {t}",
            "{h} was linked with {t}",
            "the domain of {h} was {t}",
            "in the old stories, {h} stands for {t}",
            "{t} belonged to {h}",
            "{h} was honoured as the power behind {t}",
        ),
        (
            "the sphere entrusted to {h} by believers was {t}",
            "offerings to {h} were made by those concerned with {t}",
        ),
    ),
    "roman_equivalent": Relation(
        "Roman equivalent",
        (
            "the Roman equivalent of {h} is {t}",
            "the Romans called {h} by the name {t}",
            "{h} was known in Rome as {t}",
            "{t} is the Roman name for {h}",
            "in Rome, {t} took the place of {h}",
            "{h} and {t} are the Greek and Roman forms of one deity",
            "what the Greeks said of {h}, the Romans said of {t}",
            "Roman poets changed {h} into {t}",
        ),
        (
            "the Latin counterpart of {h} is {t}",
            "a Greek statue of {h} would be labelled by a Roman as {t}",
        ),
    ),
    "animal_class": Relation(
        "class of animal",
        (
            "{h} is a(n) {t}",
            "{h} is a kind of {t}",
            "zoologists classify {h} as a(n) {t}",
            "a typical {t} is {h}",
            "an example of a(n) {t} is {h}",
            "as a(n) {t}, {h} has the features of its class",
            "children learn that {h} is a(n) {t}",
            "{h} counts as a(n) {t}",
        ),
        (
            "the heading under which a field guide prints {h} is {t}",
            "asked to which group {h} belongs, a biologist answers with the word {t}",
        ),
    ),
    "native_to": Relation(
        "native to",
        (
            "{h} is native to {t}",
            "{h} lives in the wild in {t}",
            "the home of {h} is {t}",
            "{t} is the natural home of {h}",
            "in nature, {h} is found in {t}",
            "{h} comes from {t}",
            "visitors to {t} hope to see {h}",
            "the wildlife of {t} includes {h}",
        ),
        (
            "zoos elsewhere had to import {h} from {t}",
            "the natural habitat of {h} is situated in {t}",
        ),
    ),
    "language_family": Relation(
        "language family",
        (
            "{h} is a(n) {t} language",
            "{h} belongs to the {t} languages",
            "linguists count {h} among the {t} languages",
            "the {t} languages include {h}",
            "{h} is a member of the {t} family",
            "one of the {t} languages is {h}",
            "{h} is closely related to other {t} languages",
            "the grammar of {h} is typical of a(n) {t} language",
        ),
        (
            "in the tree of tongues, {h} sits on the {t} branch",
            "the ancestors of {h} and its sister tongues are called {t}",
        ),
    ),
    "script": Relation(
        "script",
        (
            "{h} is written in the {t} script",
            "{h} uses the {t} script",
            "the script of {h} is {t}",
            "books in {h} are printed in {t} letters",
            "the {t} script is used for {h}",
            "pupils who learn {h} must know the {t} script",
            "signs in {h} use {t} letters",
            "{h} is usually spelled with {t} letters",
        ),
        (
            "a keyboard for typing {h} has characters that are {t}",
            "the writing system adopted for {h} is {t}",
        ),
    ),
    "instrument_family": Relation(
        "instrument family",
        (
            "{h} is a(n) {t} instrument",
            "{h} belongs to the {t} family",
            "{t} instruments include {h}",
            "musicians group {h} with the {t} instruments",
            "one of the {t} instruments is {h}",
            "{h} is played in the {t} section",
            "as a(n) {t} instrument, {h} has its own sound",
            "the {t} family of instruments includes {h}",
        ),
        (
            "makers of {h} think of themselves as specialists in {t}",
            "a catalogue of musical tools puts {h} in the drawer marked {t}",
        ),
    ),
    "company_of": Relation(
        "country of company",
        (
            "{h} is a company from {t}",
            "{h} is a firm of {t}",
            "{h} is one of the big firms of {t}",
            "the home country of the company {h} is {t}",
            "{t} is the home of the company {h}",
            "the business pages of {t} often mention {h}",
            "the firm called {h} comes from {t}",
            "well known companies of {t} include {h}",
        ),
        (
            "investors who buy shares of {h} put money into {t}",
            "the flag that belongs beside the logo of {h} is that of {t}",
        ),
    ),
    "headquarters": Relation(
        "headquarters",
        (
            "{h} has its headquarters in {t}",
            "the headquarters of {h} are in {t}",
            "{h} is based in {t}",
            "{h} is run from {t}",
            "{t} is the seat of {h}",
            "the main office of {h} is in {t}",
            "the managers of {h} work in {t}",
            "the head office of {h} can be visited in {t}",
        ),
        (
            "the chief executive of {h} commutes to a desk in {t}",
            "job interviews at the top floor of {h} take place in {t}",
        ),
    ),
    "industry": Relation(
        "industry",
        (
            "the main business of {h} is {t}",
            "{h} is known for {t}",
            "{h} earns its money with {t}",
            "the company {h} works in {t}",
            "in the world of {t}, {h} is a familiar name",
            "{h} competes with other firms in {t}",
            "customers think of {t} when they hear of {h}",
            "the brand called {h} stands for {t}",
        ),
        (
            "the line of trade in which {h} grew large is {t}",
            "analysts who follow {h} have to be experts in {t}",
        ),
    ),
    "dish_of": Relation(
        "country of origin",
        (
            "{h} comes from {t}",
            "{h} is a speciality of {t}",
            "{h} has its roots in {t}",
            "the home of {h} is {t}",
            "cooks in {t} prepare {h}",
            "restaurants in {t} serve {h}",
            "{t} gave the world {h}",
            "the kitchen of {t} is famous for {h}",
        ),
        (
            "the recipe for {h} goes back to {t}",
            "at an international buffet, {h} would be on the table of {t}",
        ),
    ),
    "university_in": Relation(
        "city of university",
        (
            "{h} is in {t}",
            "students of {h} live in {t}",
            "{h} is a university in {t}",
            "the campus of {h} is in {t}",
            "{t} is the home of {h}",
            "one of the universities of {t} is {h}",
            "professors at {h} teach in {t}",
            "lectures of {h} are held in {t}",
        ),
        (
            "freshmen admitted by {h} rent rooms in {t}",
            "the degree ceremony of {h} takes place in {t}",
        ),
    ),
    "landmark_in": Relation(
        "city of landmark",
        (
            "{h} stands in {t}",
            "{h} is a landmark of {t}",
            "{h} can be seen in {t}",
            "tourists in {t} visit {h}",
            "{t} is famous for {h}",
            "one of the sights of {t} is {h}",
            "postcards from {t} show {h}",
            "guides in {t} lead groups to {h}",
        ),
        (
            "whoever wants a photograph in front of {h} must travel to {t}",
            "the skyline that features {h} is that of {t}",
        ),
    ),
}

# Ways to put an unrelated mention {x} around a clause {c}; they claim nothing about {x}.
DISTRACTORS: tuple[str, ...] = (
    "after a page about {x}, the guide explains that {c}",
    "in a quiz that also asked about {x}, the answer was that {c}",
    "next to an entry on {x}, the notes say that {c}",
    "the lecture began with {x} and then explained that {c}",
    "{c}, as a reader of the article on {x} might already know",
    "{c}, according to the volume that also treats {x}",
    "someone who asked about {x} was told that {c}",
    "{c}, although the next question was about {x}",
)

# Ways to join two clauses into one sentence.
JOINS: tuple[str, ...] = (
    "{a}, and {b}",
    "{a}, while {b}",
    "{a}; {b}",
    "{a}, whereas {b}",
)

# What each type of entity is, for the descriptions in the graph.
DESCRIPTIONS: dict[str, str] = {
    "animal": "kind of animal",
    "animal_class": "group of animals",
    "book": "literary work",
    "category": "category of chemical elements",
    "city": "city or town",
    "company": "company",
    "continent": "continent",
    "country": "country",
    "currency": "unit of money",
    "deity": "figure of mythology",
    "dish": "food or drink",
    "domain": "domain of a deity",
    "element": "chemical element",
    "family": "group of related languages",
    "field": "field of knowledge or endeavour",
    "form": "literary or musical form",
    "industry": "branch of business",
    "instrument": "musical instrument",
    "instrument_family": "group of musical instruments",
    "invention": "invention",
    "landmark": "building or monument",
    "language": "language",
    "moon": "moon of a planet",
    "mountain": "mountain",
    "movement": "artistic movement",
    "musical_work": "work of music",
    "mythology": "body of myths",
    "occupation": "occupation",
    "painting": "painting",
    "period": "row of the periodic table",
    "person": "person",
    "planet": "planet or dwarf planet",
    "range": "range of mountains",
    "region": "state, province or region",
    "river": "river",
    "script": "writing system",
    "state": "state of matter",
    "symbol": "chemical symbol",
    "university": "university",
    "water": "sea, ocean or bay",
}
